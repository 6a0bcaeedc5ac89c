"""Schemes: named specs, their options in text, and other schemes for some layers."""

import re
from dataclasses import fields, replace
from typing import Any

import pytest

from passes.smoothing.smoothquant import SmoothQuant
from qcompiler.errors import ParseError, PassError, QCompilerError
from qcompiler.ir import Graph
from qcompiler.ir.formats import FP8_BLOCK, FP8_TILE, INT8_ROW, INT8_TENSOR
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.schemes.named import (
    SCHEMES,
    Options,
    Scheme,
    all_schemes,
    find,
    list_schemes,
    pipeline,
    register,
    spec_of,
)
from qcompiler.schemes.pipelines import QuantizationSpec

CALIBRATED = ["fp8_tensor_static", "int8_tensor_static", "smoothquant_o1", "smoothquant_o2", "smoothquant_o3",
              "smoothquant_fp8", "fp8_tile_smooth"]  # fmt: skip
OTHERS = ["fp8_tile", "fp8_row", "fp8_tensor", "int8_row", "int8_tensor", "int8_channel_reference",
          "fp8_channel_reference"]  # fmt: skip


def test_the_table() -> None:
    assert {*SCHEMES} == {*CALIBRATED, *OTHERS}
    assert next(iter(SCHEMES)) == "fp8_tile"  # the default is first
    assert {name for name, scheme in SCHEMES.items() if scheme.spec and scheme.spec.needs_calibration} == {*CALIBRATED}


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_is_a_pipeline_in_its_own_spelling(name: str) -> None:
    scheme = SCHEMES[name]
    assert str(pipeline(name)) == scheme.pipeline
    assert Pipeline.parse(scheme.pipeline) == pipeline(name) == pipeline(f" {name} ") == pipeline(f"{name}{{}}")
    assert scheme.doc.endswith(".") and scheme.name == name
    assert find(name) is all_schemes()[name] is scheme
    assert {*scheme.options} <= {option.name for option in fields(Options)}
    assert ("calibrate" in pipeline(name)) == (name in CALIBRATED)
    assert ("fuse-prescale" in pipeline(name)) == ("smooth" in name)


@pytest.mark.parametrize("name", OTHERS)
def test_a_scheme_that_has_run_has_nothing_left_to_do(name: str) -> None:
    graph = Graph.parse(
        "func @m(%x: f32[s0, 256]) -> (f32[s0, 64]) where s0 in 0.. {\n"
        '  %w = core.param() {name = "w"} : f32[256, 64]\n'
        "  %y = aten.matmul(%x, %w) : f32[s0, 64]\n  return %y\n}"
    )
    run_pipeline(pipeline(name), graph)
    text = str(graph)
    assert "linear(%x_q, %x_s" in text
    run_pipeline(pipeline(name), graph)
    assert str(graph) == text


UE8M0 = 'fp8-tile{x_format=#fp8_tile<profile = "ue8m0">, w_format=#fp8_block<profile = "ue8m0">}'
DEEPGEMM = (
    'fp8-tile{x_format=#format<f8e4m3fn, block = [1, 32], profile = "deepgemm">, '
    'w_format=#fp8_block<profile = "deepgemm">}'
)
E5M2_ROW = "#format<f8e5m2, block = [1, -1]>"


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("fp8_tile", "fp8-tile"),
        ("fp8_tile{k_block=64}", "fp8-tile{x_format=#format<f8e4m3fn, block = [1, 64]>}"),
        ("fp8_tile{k_block=-1}", "fp8-tile{x_format=#fp8_row}"),
        ("fp8_tile{k-block=32, numerics=deepgemm}", DEEPGEMM),
        ("fp8_tile{scale=ue8m0}", UE8M0),
        ("fp8_tile{scale=ue8m0, numerics=ue8m0}", UE8M0),
        ("fp8_tile{numerics=ue8m0}", UE8M0),
        ("fp8_tile{scale=f32, dtype=f8e4m3fn}", "fp8-tile"),
        ("fp8_row{dtype=f8e5m2}", f"quantize{{x_format={E5M2_ROW}, w_format={E5M2_ROW}}}"),
        ("fp8_tensor{w=channel}", "quantize{x_format=#fp8_tensor}"),
        ("fp8_tensor{w=block}", "quantize{x_format=#fp8_tensor, w_format=#fp8_block}"),
        ("fp8_tensor_static{observer=percentile, percentile=99}",
         "quantize{x_format=#fp8_tensor, w_format=#fp8_tensor, static=true, observer=percentile, percentile=99.0}"),
        ("int8_row{numerics=vllm}",
         'quantize{x_format=#int8_row<profile = "vllm">, w_format=#int8_row<profile = "vllm">}'),
        ("int8_tensor_static{observer=minmax}",
         "quantize{x_format=#int8_tensor, w_format=#int8_tensor, static=true, observer=minmax}"),
        ("int8_channel_reference", "quantize{x_format=#int8_channel, w_format=#int8_row}"),
        ("fp8_channel_reference{dtype=f8e5m2}", 
         f"quantize{{x_format=#format<f8e5m2, block = [-1, 1]>, w_format={E5M2_ROW}}}"),
        ("smoothquant_o1{w=channel}", "quantize{x_format=#int8_row, w_format=#int8_row}"),
        ("smoothquant_o3", "quantize{x_format=#int8_tensor, w_format=#int8_tensor, static=true}"),
        ("fp8_tile_smooth{k_block=64}", "fp8-tile{x_format=#format<f8e4m3fn, block = [1, 64]>}"),
    ],
)  # fmt: skip
def test_options_reach_the_pass_that_quantizes(name: str, step: str) -> None:
    found = pipeline(name)
    assert str(found["fp8-tile" if step.startswith("fp8-tile") else "quantize"]) == step
    assert Pipeline.parse(str(found)) == found


def test_options_reach_the_pass_that_smooths() -> None:
    step = pipeline("smoothquant_o2{alpha=0.75, pow2=true, w=channel, numerics=vllm}")["smoothquant"]
    assert step == SmoothQuant(
        replace(INT8_TENSOR, profile="vllm"), replace(INT8_ROW, profile="vllm"), alpha=0.75, pow2=True, min_gain=None
    )
    step = pipeline("fp8_tile_smooth{alpha=learn}")["smoothquant"]
    assert step == SmoothQuant(FP8_TILE, FP8_BLOCK, alpha="learn", min_gain=0.02)
    assert spec_of("smoothquant_o1{alpha=1}").alpha == 1.0


@pytest.mark.parametrize("name", ["fp8-tile", "fp8_tyle", "FP8_TILE", "fp8_tilee"])
def test_did_you_mean(name: str) -> None:
    with pytest.raises(PassError) as error:
        pipeline(name)
    known = f"Known: {', '.join(sorted(SCHEMES))}."
    assert str(error.value) == f"no such scheme: got '{name}'. Did you mean 'fp8_tile'? {known}"


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("fp8_tile{k_blok=64}", PassError, "scheme 'fp8_tile' has no such option: got 'k_blok'. Did you mean 'k_block"),
        ("fp8_row{k_block=64}", PassError, "scheme 'fp8_row' has no such option: got 'k_block'."),
        ("int8_row{dtype=i8}", PassError, "scheme 'int8_row' has no such option: got 'dtype'."),
        ("fp8_tensor{observer=mse}", PassError, "scheme 'fp8_tensor' has no such option: got 'observer'."),
        ("fp8_tile{x=token}", PassError, "scheme 'fp8_tile' has no such option: got 'x'."),
        ("fp8_tile{k_block=1.5}", PassError, "option 'k_block' of scheme 'fp8_tile' has a wrong value: got 1.5; need "),
        ("fp8_tile{k_block=0}", PassError, "option 'k_block' of scheme 'fp8_tile' has a wrong value: got 0; need 16, "),
        ("fp8_tile{k_block=-2}", PassError, "option 'k_block' of scheme 'fp8_tile' has a wrong value: got -2; need 16"),
        ("fp8_tile{k_block=7}", PassError, "option 'k_block' of scheme 'fp8_tile' has a wrong value: got 7; need 16, "
         "32, 64, 128, 256, 512, or -1 for the whole row"),
        ("W8A8", PassError, "no such scheme: got 'W8A8'. W8A8 is 'int8_row' in INT8 and 'fp8_row' in FP8. Known: "),
        ("llm.int8()", PassError, "no such scheme: got 'llm.int8()'. LLM.int8, which keeps outlier columns in float"),
        ("fp8_tile{dtype=i8}", PassError, "option 'dtype' of scheme 'fp8_tile' has a wrong value: got i8; need f8e4m3"),
        ("fp8_row{dtype=bf16}", PassError, "option 'dtype' of scheme 'fp8_row' has a wrong value: got bf16; need f8e4"),
        ("fp8_tile{scale=ue8m0, numerics=deepgemm}", PassError, "this numerics profile does not support power-of-"
         "two scales: got deepgemm; need numerics=deepseek, which the profile 'ue8m0' otherwise matches"),
        ("fp8_tile{scale=e8m0}", PassError, "option 'scale' of scheme 'fp8_tile' has a wrong value: got e8m0; need one "
         'of "f32", ue8m0'),
        ("fp8_tile{numerics=deepseak}", QCompilerError, "unknown quantization profile: got 'deepseak'. Did you mean '"),
        ("fp8_tensor_static{observer=max}", PassError, "option 'observer' of scheme 'fp8_tensor_static' has a wrong v"),
        ("fp8_tensor_static{percentile=0}", PassError, "a percentile must be above 0 and at most 100: got 0.0"),
        ("smoothquant_o1{alpha=2}", PassError, "option 'alpha' of pass 'smoothquant' is out of range: got 2.0; need 0"),
        ("smoothquant_o1{alpha=guess}", PassError, "option 'alpha' of scheme 'smoothquant_o1' has a wrong value: got "),
        ("smoothquant_o1{pow2=1}", PassError, "option 'pow2' of scheme 'smoothquant_o1' has a wrong value: got 1; nee"),
        ("fp8_tensor{w=token}", PassError, "option 'w' of scheme 'fp8_tensor' has a wrong value: got token; need one "),
        ("fp8_tile{k_block}", ParseError, "<scheme>:1:10: option 'k_block' has no value"),
        ("fp8_tile{k_block=64, k_block=64}", ParseError, "<scheme>:1:22: option 'k_block' is given twice"),
        ("fp8_tile{k_block=[}", ParseError, "<scheme>:1:19: expected a literal, but got '}'"),
        ("fp8_tile k_block=64", ParseError, "<scheme>:1:10: options must be in braces: {option=value, option="),
        ("fp8_tile{k_block=64", ParseError, "<scheme>:1:20: expected ',' or '}', but got the end of the text"),
        ("", ParseError, "<scheme>:1:1: expected the name of a scheme, but got the end of the text"),
        (None, PassError, "a scheme must be a string: got None; need such as \"fp8_tile\""),
        (SCHEMES["fp8_row"], PassError, "a scheme must be a string: got Scheme(name='fp8_row'"),
    ],
)  # fmt: skip
def test_wrong_options(text: Any, kind: type[QCompilerError], message: str) -> None:
    for overrides in (None, {"*": "fp8_row"}):
        with pytest.raises(kind) as error:
            pipeline(text, overrides)
        assert str(error.value).startswith(message)
    if text is not None:  # which means: leave it alone
        with pytest.raises(kind, match=re.escape(message)):
            pipeline("fp8_row", {"*.x": text})


def test_a_name_is_taken_once() -> None:
    assert register(SCHEMES["fp8_tile"]) is SCHEMES["fp8_tile"]
    with pytest.raises(PassError, match="two schemes have the same name: got 'fp8_tile'"):
        register(Scheme("fp8_tile", "Another.", "dead-code"))


def test_a_scheme_is_a_pipeline_or_a_spec() -> None:
    for given in ({}, {"pipeline": "dead-code", "spec": QuantizationSpec()}):
        with pytest.raises(PassError, match="scheme 'mine' needs either a pipeline or a spec"):
            Scheme("mine", "Mine.", **given)  # type: ignore[arg-type]  # wrong on purpose
    assert Scheme("mine", "Mine.", spec=QuantizationSpec()).pipeline == SCHEMES["fp8_tile"].pipeline


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "two words"}, "the name of a scheme is not valid: got 'two words'; need letters"),
        ({"options": ("alhpa",)}, "scheme 'mine' lists an unknown option: got 'alhpa'. Did you mean 'alpha'?"),
        ({"spec": {"smooth": "meassured"}}, "'smooth' of a quantization spec has a wrong value: got 'meassured'; need"),
        ({"spec": {"alpha": "serach"}}, "option 'alpha' of a quantization spec has a wrong value: got 'serach'"),
        ({"spec": {"x": 8}}, "option 'x' of a quantization spec has a wrong value: got 8; need a format such as"),
    ],
)
def test_a_wrong_scheme_is_an_error_where_it_is_written(given: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=re.escape(message)):
        Scheme(**{"name": "mine", "doc": "Mine.", **given, "spec": QuantizationSpec(**given.get("spec", {}))})


def test_a_spec_takes_names_of_formats() -> None:
    named: Any = QuantizationSpec("int8_row", "int8_row")  # type: ignore[arg-type]
    assert named == QuantizationSpec(INT8_ROW, INT8_ROW)


# Other schemes for some layers


def layers_of(overrides: dict[str, str | None], scheme: str = "fp8_tile") -> dict[str, list[str]]:
    """The passes that quantize, without their layers, and those."""
    found = pipeline(scheme, overrides)
    assert Pipeline.parse(str(found)) == found
    steps = [step for step in found if step.name in ("quantize", "fp8-tile")]
    return {str(step).partition("layers=")[0]: [*getattr(step, "layers")] for step in steps}  # noqa: B009


@pytest.mark.parametrize(
    ("overrides", "layers"),
    [
        ({}, {"fp8-tile": ["*"]}),
        ({"a": None}, {"fp8-tile{": ["*", "!a"]}),
        ({"a": "fp8_row"}, {"fp8-tile{": ["*", "!a"], "quantize{": ["a"]}),
        ({"a": "fp8_row", "a.b": None}, {"fp8-tile{": ["*", "!a", "!a.b"], "quantize{": ["a", "!a.b"]}),
        ({"a.b": None, "a": "fp8_row"}, {"fp8-tile{": ["*", "!a.b", "!a"], "quantize{": ["a"]}),
        ({"a": "fp8_row", "b": "fp8_row"}, {"fp8-tile{": ["*", "!a", "!b"], "quantize{": ["a", "b"]}),
        ({"a": "fp8_row", "b": "fp8_row{dtype=f8e4m3fn}"}, {"fp8-tile{": ["*", "!a", "!b"], "quantize{": ["a", "b"]}),
        ({"a": None, "a.b": "fp8_tile{k_block=128}"}, {"fp8-tile{": ["*", "!a", "a.b"]}),
        ({"*": None, "a": "fp8_tile"}, {"fp8-tile{": ["*", "!*", "a"]}),
        ({"a": "fp8_row", "b": "int8_row", "a*": "fp8_tile"},
         {"fp8-tile{": ["*", "!a", "!b", "a*"], "quantize{": ["a", "!b", "!a*"],
          "quantize{x_format=#int8_row, w_format=#int8_row, ": ["b", "!a*"]}),
    ],
)  # fmt: skip
def test_overrides_become_layers(overrides: dict[str, str | None], layers: dict[str, list[str]]) -> None:
    assert layers_of(overrides) == layers


def test_overrides_share_what_stands_around() -> None:
    found = pipeline("fp8_tile", {"a": "smoothquant_o3{observer=mse}", "b": "fp8_tensor_static{observer=percentile}"})
    assert found.names == (
        "canonicalize", "attention", "dead-code", "calibrate", "smoothquant", "calibrate#2", "merge-linears",
        "fp8-tile", "quantize", "quantize#2", "share-quantize", "fuse-prescale", "fuse-linear", "fold-constants",
        "dead-code#2", "to-kernels", "gather-codes", "fuse-norm-quantize", "fuse-activation-quantize", "fuse-epilogue",
    )  # fmt: skip
    assert str(found["calibrate"]) == str(found["calibrate#2"]) == 'calibrate{histogram=true, layers=["*", "a", "b"]}'
    assert getattr(found["smoothquant"], "layers") == ("a", "!b")  # noqa: B009


def test_ignored_layers_are_overrides_without_a_scheme() -> None:
    assert pipeline("fp8_tile", ignore=["a", "*.b"]) == pipeline("fp8_tile", {"a": None, "*.b": None})
    assert pipeline("fp8_tile", {"*": "fp8_row", "a": None}, ["a"]) == pipeline("fp8_tile", {"*": "fp8_row", "a": None})
    both = pipeline("fp8_tile", {"a": None, "*": "fp8_row"}, ignore=("a",))
    assert both == pipeline("fp8_tile", {"*": "fp8_row", "a": None})  # after all overrides
    assert pipeline("fp8_tile", ignore=()) == pipeline("fp8_tile")


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        ("lm_head", "ignore has the wrong type: got 'lm_head'; need a list such as [\"lm_head\"]. For a single"),
        (None, "ignore has the wrong type: got None"),
        (["a"], "a pattern is both ignored and overridden: got 'a'; need one of them"),
        (["!a"], "a pattern in overrides is invalid: got '!a'"),
    ],
)
def test_wrong_patterns_to_ignore(ignore: Any, message: str) -> None:
    with pytest.raises(PassError) as error:
        pipeline("fp8_tile", {"a": "fp8_row"}, ignore)
    assert str(error.value).startswith(message)


def test_the_list_of_schemes() -> None:
    assert list_schemes() == {name: scheme.doc for name, scheme in SCHEMES.items()}


def test_overrides_without_any_are_the_scheme() -> None:
    assert pipeline("fp8_row{numerics=vllm}", {}) == pipeline("fp8_row{numerics=vllm}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["a"], 'overrides has the wrong type: got list; need a dict such as {"*.down_proj": "fp8_row", "lm_head'),
        ("a", "overrides has the wrong type: got str"),
        ({"!a": "fp8_row"}, "a pattern in overrides is invalid: got '!a'; need a name such as '*.down_proj'"),
        ({"": None}, "a pattern in overrides is invalid: got ''"),
        ({3: None}, "a pattern in overrides is invalid: got 3"),
        ({"a": "fp8_rov"}, "no such scheme: got 'fp8_rov'. Did you mean 'fp8_row'?"),
        ({"a": 3}, "a scheme must be a string: got 3"),
    ],
)
def test_wrong_overrides(overrides: Any, message: str) -> None:
    with pytest.raises(PassError) as error:
        pipeline("fp8_tile", overrides)
    assert str(error.value).startswith(message)


def test_a_scheme_that_is_only_a_pipeline() -> None:
    mine = register(Scheme("my_pipeline", "Mine.", "canonicalize; fp8-tile"))
    try:
        assert str(pipeline("my_pipeline")) == str(pipeline("my_pipeline{}")) == mine.pipeline
        for scheme, overrides in (
            ("my_pipeline{k_block=64}", None),
            ("my_pipeline", {}),
            ("fp8_row", {"a": mine.name}),
        ):
            with pytest.raises(PassError) as error:
                pipeline(scheme, overrides)
            assert str(error.value) == (
                "a scheme without a spec has no options and applies to all layers: got 'my_pipeline'. "
                "Edit its pipeline instead."
            )
    finally:
        del SCHEMES["my_pipeline"]
