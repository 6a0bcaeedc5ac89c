"""Every error of `qcompiler.compile`, and of calling what it returns, with its message."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Mlp
from torch import Tensor, nn

import qcompiler
from qcompiler import CaptureError, CodegenError, CompiledModel, InputError, ParseError, PassError, QCompilerError

X = torch.randn(5, 200, generator=torch.Generator().manual_seed(1))


WRONG_CALLS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda f: f(), "the argument 'x' is missing"),
    (lambda f: f(X, 2.0), "the argument 'scale' was not given at capture"),
    (lambda f: f(X, None, None, None), "args"),
    (lambda f: f(X, y=X), "the argument 'y' was not given at capture"),
    (lambda f: f(X.half()), "x has a different dtype than at capture: got torch.float16; need torch.float32"),
    (lambda f: f(X.to("meta")), "x is on a different device than at capture: got meta; need cpu"),
    (lambda f: f(X[0]), "x has a different rank than at capture"),
    (lambda f: f(X[:, :100]), "dimension 1 of x has a different size than at capture: got 100; need 200"),
    (lambda f: f([X]), "the argument 'x' has a different structure"),
    (lambda f: f(3.0), "x must be a tensor: got 3.0"),
]


@pytest.mark.parametrize(("call", "message"), WRONG_CALLS, ids=[message for _, message in WRONG_CALLS])
def test_wrong_arguments_at_run_time(fast: CompiledModel, call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        call(fast)


def test_a_size_outside_of_the_captured_range(mlp: Mlp) -> None:
    fast = qcompiler.compile(
        mlp, example_inputs=(X,), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=2, max=8)}}
    )
    with pytest.raises(
        InputError, match=r"dimension 0 of x is outside the captured range: got 9; need s0 with s0 in [012]\.\.8"
    ):
        fast(X.repeat(2, 1)[:9])
    fixed = qcompiler.compile(mlp, example_inputs=(X,), dynamic_shapes=None)
    with pytest.raises(InputError, match="dimension 0 of x has a different size than at capture: got 4; need 5"):
        fixed(X[:4])


WRONG_COMPILES: list[tuple[dict[str, Any], type[QCompilerError], str]] = [
    ({"scheme": "fp8tile"}, PassError, "no such scheme: got 'fp8tile'. Did you mean 'fp8_tile'?"),
    ({"pipeline": "canonicalize; fp8-tiel"}, PassError, "Did you mean 'fp8-tile'?"),
    ({"pipeline": "fp8-tile{x_formt=#fp8_row}"}, PassError, "Did you mean 'x_format'?"),
    ({"pipeline": "fp8-tile{x_format=7}"}, PassError, "option 'x_format' of pass 'fp8-tile' has a wrong value"),
    ({"pipeline": "fp8-tile{"}, QCompilerError, "'{'"),
    ({"pipeline": ["fp8-tile"]}, PassError, "the pipeline is of a wrong type: got list; need a Pipeline, or its text"),
    ({"scheme": "other", "pipeline": "fp8-tile"}, PassError, "both a scheme and a pipeline are given"),
    *(
        ({"target": word}, CodegenError, f"no such target: got '{word}'. Use target='cuda' for the model's GPU")
        for word in ("gpu", "cuda:0", "H100", "hopper", "sm90", "triton")
    ),
    ({"target": "cpuu"}, CodegenError, "no such target: got 'cpuu'. Did you mean 'cpu'? Known: auto, cpu, cuda, sm_"),
    ({"target": None}, CodegenError, "no such target: got None"),
    ({"dynamic_shapes": "atuo"}, CaptureError, "dynamic_shapes is wrong: got 'atuo'"),
    ({"dynamic_shapes": True}, CaptureError, 'dynamic_shapes is wrong: got True; need "auto", None, or what'),
    ({"sharding": "tp"}, PassError, "a sharding needs a mesh: got sharding='tp' and no mesh. Give a mesh"),
    ({"mesh": qcompiler.simulated_mesh(tp=2), "sharding": ["tp"]}, PassError, "sharding is of a wrong type: got list"),
    (
        {"mesh": qcompiler.simulated_mesh(tp=2), "sharding": ""},
        PassError,
        "a sharding needs a tactic: need one of tp, sp, ep",
    ),
    ({"example_inputs": X}, CaptureError, "example_inputs is of a wrong type: got Tensor; need a tuple of arguments."),
    ({"example_kwargs": (X,)}, CaptureError, "example_kwargs is of a wrong type: got tuple"),
    ({"instruments": ["time"]}, PassError, "this is not an instrument: got 'time'"),
]


@pytest.mark.parametrize(("keywords", "kind", "message"), WRONG_COMPILES, ids=[m for _, _, m in WRONG_COMPILES])
def test_wrong_arguments_of_compile_fail_at_once(
    mlp: Mlp, keywords: dict[str, Any], kind: type[QCompilerError], message: str
) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        qcompiler.compile(mlp, **keywords)


def test_malformed_text_has_a_place(mlp: Mlp) -> None:
    with pytest.raises((ParseError, PassError), match=r"closed|brackets"):
        qcompiler.compile(mlp, pipeline="canonicalize; fp8-tile{observer=mse")


def test_what_cannot_be_compiled(mlp: Mlp) -> None:
    with pytest.raises(
        CaptureError, match=r"only a torch\.nn\.Module or an ExportedProgram can be captured: got function"
    ):
        qcompiler.compile(lambda x: x)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(CaptureError, match=r"the model is in training mode: .* Call model\.eval\(\) first"):
        qcompiler.compile(mlp.train())
    with pytest.raises(
        CodegenError, match=r"the target sm_90a runs on cuda, but the model is on another device: got cpu; need cuda"
    ):
        qcompiler.compile(mlp.eval(), target="sm_90a", example_inputs=(X,))


def test_a_graph_without_its_weights(fast: CompiledModel) -> None:
    captured = fast.stages["captured"]
    bare = qcompiler.Graph.parse(str(captured))
    names = [str(op.attrs["name"]) for op in captured.ops("core.param")]
    with pytest.raises(CaptureError) as error:
        qcompiler.compile(bare)
    assert str(error.value) == (
        f"the graph reads weights that it does not have: got none called '{names[0]}', and {len(names) - 1} others "
        f"(in @{captured.name}). A text has no weights: add the tensors, graph.weights[name] = tensor."
    )


def test_a_compiled_model_is_not_compiled_again(mlp: Mlp) -> None:
    message = r"is already compiled: need a floating-point model. Compile the original model"
    fast = qcompiler.compile(mlp, example_inputs=(X,))
    for again in (fast, fast.eval(), qcompiler.compile(mlp), copy.deepcopy(fast)):
        with pytest.raises(CaptureError, match=f"model {message}"):
            qcompiler.compile(again, example_inputs=(X,))
    with pytest.raises(CaptureError, match=rf"model\.1 {message}"):
        qcompiler.compile(nn.Sequential(nn.Linear(200, 200), fast).eval(), example_inputs=(X,))
    assert not any(module.training for module in fast.modules())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


def test_a_model_that_cannot_be_captured_quotes_its_line() -> None:
    with pytest.raises(CaptureError, match=r"(?s)depends on tensor values.*x\.sum\(\) > 0"):
        qcompiler.compile(Branches().eval(), example_inputs=(torch.randn(2, 8),))


def test_a_failed_first_call_can_be_repeated(mlp: Mlp) -> None:
    fast = qcompiler.compile(mlp, pipeline="canonicalize")
    for _ in range(2):
        with pytest.raises(
            PassError, match=r"(?s)nothing was quantized: got the pipeline 'canonicalize'.*strict=False.*%linear"
        ):
            fast(X)
    gone = qcompiler.compile(Mlp().eval(), pipeline="canonicalize")
    with pytest.raises(PassError, match="nothing was quantized"):
        gone(X)
    with pytest.raises(CaptureError, match=r"the model has been freed\. Call compile\(\) again"):
        gone(X)


def test_not_strict(mlp: Mlp) -> None:
    fast = qcompiler.compile(mlp, pipeline="canonicalize", example_inputs=(X,), strict=False)
    assert torch.allclose(fast(X), mlp(X), rtol=1e-5, atol=1e-6)
    assert not fast.report.quantized


def test_an_unexpected_failure_keeps_the_graph(mlp: Mlp, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by accident")

    monkeypatch.setattr("qcompiler.program.program.emit_host_module", broken)
    with pytest.raises(
        QCompilerError, match="generating the host module failed unexpectedly: ZeroDivisionError: by acc"
    ) as caught:
        qcompiler.compile(mlp, example_inputs=(X,))
    (kept,) = re.findall(r"is in (\S+\.qir)", str(caught.value))
    assert qcompiler.Graph.parse(Path(kept).read_text(encoding="utf-8")).ops("kernel.quantize")
    Path(kept).unlink()
    monkeypatch.setattr("qcompiler.program.program.capture", broken)
    with pytest.raises(CaptureError, match="capturing the model failed unexpectedly: ZeroDivisionError: by accident"):
        qcompiler.compile(mlp, example_inputs=(X,))
