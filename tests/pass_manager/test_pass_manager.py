"""Passes and pipelines as values: text round-trip, types of options, editing, and error messages."""

import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from passes.cleanup.dead_code import DeadCode
from passes.quantizing.fp8_tile import Fp8Tile
from qcompiler.errors import ParseError, PassError, QCompilerError
from qcompiler.ir import DType, Format, Graph, Match, Missed, Op, Rewriter, Rule
from qcompiler.ir.formats import FP8_BLOCK, FP8_TILE
from qcompiler.pass_manager.pipeline import PASSES, Effect, Pass, Pipeline


@dataclass(frozen=True)
class Options(Pass):
    """x  ->  x"""

    name: ClassVar[str] = "test-options"

    needed: int
    ratio: float = 0.5
    flag: bool = False
    word: str = "some"
    maybe: str | None = None
    kind: DType = DType.bf16
    mode: Literal["fast", "slow"] = "fast"
    sizes: tuple[int, ...] = ()
    pair: tuple[float, float] = (1.0, 2.0)
    made: tuple[str, ...] = field(default_factory=lambda: ("a",))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ratio": -2.5e-7},
        {"ratio": float("inf")},
        {"flag": True},
        {"word": "two words, {and} [a; 'mark'] = \"x\""},
        {"word": "true"},
        {"word": ""},
        {"word": "fp8-tile"},
        {"maybe": "None"},
        {"maybe": "bf16"},
        {"kind": DType.f8e5m2},
        {"mode": "slow"},
        {"sizes": (1, 2, 3)},
        {"pair": (0.5, -1.0)},
        {"made": ()},
        {"made": ("b; c", "d")},
    ],
)
def test_text_and_back(options: dict[str, Any]) -> None:
    step = Options(3, **options)
    assert Pass.parse(str(step)) == step
    pipeline = Pipeline((step, DeadCode(), step))
    assert Pipeline.parse(str(pipeline)) == pipeline


VLLM = Fp8Tile(Format(DType.f8e4m3fn, (1, 64), profile="vllm"), replace(FP8_BLOCK, profile="vllm"))


def test_only_what_differs_from_the_default_is_printed() -> None:
    assert str(Options(needed=1)) == "test-options{needed=1}"
    assert (
        str(VLLM) == 'fp8-tile{x_format=#format<f8e4m3fn, block = [1, 64], profile = "vllm">, '
        'w_format=#fp8_block<profile = "vllm">}'
    )


@pytest.mark.parametrize(
    ("spec", "step"),
    [
        (
            " fp8-tile { x-format = #format< f8e4m3fn , block = [ 1 , 64 ] > } ",
            Fp8Tile(Format(DType.f8e4m3fn, (1, 64))),
        ),
        ("fp8-tile{}", Fp8Tile()),
        ('fp8-tile{x_format=#fp8_tile<profile = "vllm">,}', Fp8Tile(Format(DType.f8e4m3fn, (1, 128), profile="vllm"))),
        ("test-options{needed=1, ratio=2, pair=[1, 2]}", Options(1, ratio=2.0, pair=(1.0, 2.0))),
    ],
)
def test_other_spellings(spec: str, step: Pass) -> None:
    assert Pass.parse(spec) == step


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("canonicalise", "no such pass: got 'canonicalise'. Did you mean 'canonicalize'? Known: "),
        (
            "fp8-tile{layrs=[1, 1]}",
            "pass 'fp8-tile' has no such option: got 'layrs'. Did you mean 'layers'? Known: layers, observer, ",
        ),
        (
            "fp8-tile{x_format=128}",
            "option 'x_format' of pass 'fp8-tile' has a wrong value: got 128; need a format such as #fp8_tile. ",
        ),
        (
            "fp8-tile{x_format=#fp8_tiel}",
            "option 'x_format' of pass 'fp8-tile' has a wrong value: got #fp8_tiel; need a format such as #fp8_tile",
        ),
        (
            "test-options{needed=true}",
            "option 'needed' of pass 'test-options' has a wrong value: got true; need an integer",
        ),
        (
            "test-options{needed=1, mode=slo}",
            "option 'mode' of pass 'test-options' has a wrong value: got slo; need one of fas",
        ),
        ("test-options", "pass 'test-options' needs an option: got 'test-options'; need needed=…"),
        (
            "canonicalize, dead-code",
            "<pipeline>:1:13: expected ';' or the end of the text, but got ','\ncanonicalize, dead-code\n            ^",
        ),
        (
            "fp8-tile profile=vllm",
            "<pipeline>:1:10: options must be in braces: {option=value, option=value}\nfp8-tile profile=vllm\n"
            "         ^^^^^^^",
        ),
        ("test-options{pair=[1, 64}", "<pipeline>:1:25: expected ',' or ']', but got '}'"),
        (
            "dead-code;\n test-options{pair=[1, 64]",
            "<pipeline>:2:27: expected ',' or '}', but got the end of the text; '{' is not closed\n"
            " test-options{pair=[1, 64]\n                          ^",
        ),
        ("dead-code}", "<pipeline>:1:10: expected ';' or the end of the text, but got '}'"),
        (
            "fp8-tile{layers=[lm_head]}",
            "<pipeline>:1:18: 'lm_head' is not a literal; a string inside a list needs quotes",
        ),
        ('fp8-tile{observer="mse}', "<pipeline>:1:19: this string is not closed"),
        (
            "fp8-tile{observer}",
            "<pipeline>:1:10: option 'observer' has no value\nfp8-tile{observer}\n         ^^^^^^^^",
        ),
        ("fp8-tile{observer=mse, observer=mse}", "<pipeline>:1:24: option 'observer' is given twice"),
        (
            'fp8-tile{x_format=#fp8_tile<profile = "deepsek">}',
            "<pipeline>:1:19: unknown quantization profile: got 'deepsek'. Did you mean 'deepseek'?",
        ),
    ],
)
def test_messages(text: str, message: str) -> None:
    with pytest.raises(QCompilerError) as error:
        Pipeline.parse(text)
    assert str(error.value).startswith(message)
    assert isinstance(error.value, ParseError) == message.startswith("<pipeline>")


@pytest.mark.parametrize(
    ("text", "excerpt"),
    [
        ("dead-code; fp8-tyle", "<pipeline>:1:12:\ndead-code; fp8-tyle\n           ^^^^^^^^"),
        ("dead-code;\nfp8-tile{blok=1}", "<pipeline>:2:10:\nfp8-tile{blok=1}\n         ^^^^"),
        ("fp8-tile{layers=[1, a.b]}", "fp8-tile{layers=[1, a.b]}\n                    ^^^"),
        ("fp8-tile{x-format = 128 }", "<pipeline>:1:21:\nfp8-tile{x-format = 128 }\n                    ^^^"),
        ("dead-code; test-options{}", "<pipeline>:1:12:\ndead-code; test-options{}\n           ^^^^^^^^^^^^^^"),
    ],
)
def test_messages_about_the_meaning_show_the_place_too(text: str, excerpt: str) -> None:
    with pytest.raises(QCompilerError) as error:
        Pipeline.parse(text)
    assert str(error.value).endswith(excerpt)


def test_no_place_is_shown_when_the_text_is_the_culprit() -> None:
    with pytest.raises(PassError) as error:
        Pipeline.parse(" fp8-tyle ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options", [{"needed": "1"}, {"needed": 1.0}, {"needed": 1, "pair": (1.0,)}, {"needed": 1, "mode": "x"}]
)
def test_options_are_held_to_their_types_in_python_too(options: dict[str, Any]) -> None:
    with pytest.raises(PassError, match="of pass 'test-options' has a wrong value"):
        Options(**options)


def test_editing() -> None:
    pipeline = Pipeline.parse("canonicalize; dead-code; fp8-tile; dead-code")
    assert str(pipeline.insert_before("fp8-tile", Options(1))) == (
        "canonicalize; dead-code; test-options{needed=1}; fp8-tile; dead-code"
    )
    assert (
        str(pipeline.insert_after("dead-code#2", "fuse-linear; to-kernels")) == f"{pipeline}; fuse-linear; to-kernels"
    )
    assert str(
        pipeline.replace("fp8-tile", Fp8Tile(replace(FP8_TILE, profile="vllm"), replace(FP8_BLOCK, profile="vllm")))
    ) == (
        'canonicalize; dead-code; fp8-tile{x_format=#fp8_tile<profile = "vllm">, w_format=#fp8_block<profile = "vllm">}'
        "; dead-code"
    )
    assert str(pipeline.replace("canonicalize")) == "dead-code; fp8-tile; dead-code"
    assert str(pipeline.without("dead-code")) == "canonicalize; fp8-tile"
    assert str(pipeline.without("dead-code#2")) == "canonicalize; dead-code; fp8-tile"
    assert str(pipeline.append("dead-code").without("canonicalize")) == "dead-code; fp8-tile; dead-code; dead-code"
    assert str(pipeline) == "canonicalize; dead-code; fp8-tile; dead-code"
    assert pipeline.names == ("canonicalize", "dead-code", "fp8-tile", "dead-code#2")
    assert pipeline["fp8-tile"] == Fp8Tile()
    assert "dead-code#2" in pipeline
    assert Fp8Tile() in pipeline
    assert "to-kernels" not in pipeline
    assert len(pipeline) == len(list(pipeline)) == 4
    assert Pipeline.parse("") == Pipeline() == Pipeline.parse(" ;\n")


def test_editing_what_is_not_there() -> None:
    with pytest.raises(PassError, match=r"the pipeline has no such pass: got 'fp8-tyle'. Did you mean 'fp8-tile'?"):
        Pipeline.parse("fp8-tile").insert_after("fp8-tyle", DeadCode())


def test_a_class_is_no_pass() -> None:
    with pytest.raises(PassError, match=r"an item of a pipeline is not a pass: .* Write DeadCode\(\)\."):
        Pipeline([DeadCode])  # type: ignore[arg-type]  # wrong on purpose
    assert Pipeline([DeadCode()]) == Pipeline((DeadCode(),))  # type: ignore[arg-type]  # what a user may write


def test_definitions_that_cannot_work() -> None:
    with pytest.raises(PassError, match="two passes have one name: got 'fp8-tile' in "):
        type("Mine", (Pass,), {"name": "fp8-tile"})
    with pytest.raises(PassError, match="the name of pass class Mine is not valid: got 'my pass'"):
        type("Mine", (Pass,), {"name": "my pass"})
    with pytest.raises(PassError, match="pass 'test-mine' is lossy but has no budget"):
        type("Mine", (Pass,), {"name": "test-mine", "effect": Effect.LOSSY})
    with pytest.raises(PassError, match="pass class Mine has no name"):
        type("Mine", (Pass,), {})()
    with pytest.raises(
        PassError, match=r"pass class Mine has options but is not a dataclass: got width\. Put @dataclass"
    ):
        type("Mine", (Pass,), {"name": "test-undecorated", "__annotations__": {"width": int}, "width": 1})(width=3)
    assert "test-mine" not in PASSES
    PASSES.pop("test-undecorated", None)


@pytest.mark.skipif(sys.version_info < (3, 14), reason="before Python 3.14 the class statement itself fails")
def test_annotations_may_name_what_only_type_checkers_know() -> None:
    scope: dict[str, Any] = {"Pass": Pass, "dataclass": dataclass}
    text = '@dataclass(frozen=True)\nclass Mine(Pass):\n    name = "test-lazy"\n    width: Unknown = 1'
    exec(f"{text}\n    def rules(self): return ()", scope)
    assert str(scope["Mine"](width=3)) == "test-lazy{width=3}"
    PASSES.pop("test-lazy")


class OnlyFirst(Rule):
    """relu(x)  ->  x, for an input x"""

    root = ("aten.relu",)

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        return {} if op["self"].op.name == "core.input" else Missed("it reads no input", op["self"])

    def rewrite(self, op: Op, rewriter: Rewriter, **_: Any) -> None:
        rewriter.replace(op, op["self"])


class Never(OnlyFirst):
    """Nothing, for another reason."""

    def match(self, op: Op, graph: Graph) -> Match | Missed:
        return Missed("never")


def test_explain_tells_all_reasons_and_only_of_what_no_rule_takes() -> None:
    @dataclass(frozen=True)
    class Two(Pass):
        """relu(x)  ->  x"""

        name: ClassVar[str] = "test-two"

        def rules(self) -> list[Rule]:
            return [OnlyFirst(), Never()]

    graph = Graph.parse(
        "func @m(%x: f32[4]) -> (f32[4]) {\n  %a = aten.relu(%x) : f32[4]\n  %b = aten.relu(%a) : f32[4]\n"
        "  return %b\n}"
    )
    assert Two().explain(graph) == {"b": "it reads no input (%a); never"}
    assert str(Two()) == "test-two"
    del PASSES["test-two"]


def test_our_passes_are_known_without_importing_them(root: Path) -> None:
    code = "import qcompiler; print(qcompiler.Pipeline.parse('canonicalize; fp8-tile'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "canonicalize; fp8-tile\n"
