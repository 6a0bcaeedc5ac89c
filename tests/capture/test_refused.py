"""Models that capture refuses: each error is one sentence and quotes the user's code where possible."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import SiluMlp
from torch import nn

from qcompiler.capture import capture
from qcompiler.errors import CaptureError
from qcompiler.testing import Function


def hooked() -> nn.Module:
    model = SiluMlp()
    model.fc1.register_forward_hook(lambda *_: None)
    return model


def backward_hooked() -> nn.Module:
    model = SiluMlp()
    model.fc2.register_full_backward_hook(lambda *_: None)
    return model


def pre_hooked() -> nn.Module:
    model = SiluMlp()
    model.register_forward_pre_hook(lambda *_: None)
    return model


def offloaded() -> nn.Module:
    model = SiluMlp()
    model.fc1._hf_hook = type("AlignDevicesHook", (), {})()
    return model


def half_training() -> nn.Module:
    model = SiluMlp()
    model.fc2.train()
    return model


def half_meta() -> nn.Module:
    model = SiluMlp()
    model.fc2.to("meta")
    return model


def sparse() -> nn.Module:
    model = SiluMlp()
    model.fc1.weight = nn.Parameter(model.fc1.weight.detach().to_sparse())
    return model


def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return torch.jit.trace(SiluMlp(), torch.randn(2, 8))


def compiled() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor imports deprecated names
        return torch.compile(SiluMlp())


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: SiluMlp().train(), r"training mode: got model.training is True. Call model.eval\(\)"),
    (half_training, "training mode: got model.fc2.training is True"),
    (hooked, "model.fc1 has a forward hook, which a graph cannot call: got hooked.<locals>.<lambda>"),
    (pre_hooked, "model has a forward pre-hook, "),
    (backward_hooked, "model.fc2 has a backward hook, "),
    (offloaded, "accelerate has put a hook on model.fc1.*: got AlignDevicesHook"),
    (lambda: nn.LazyLinear(4).eval(), "'weight' is uninitialized. Call the model once"),
    (half_meta, "'fc2.weight' is on the meta device and has no data"),
    (sparse, "weight 'fc1.weight' does not store all of its elements in order: got torch.sparse_coo; need torch.str"),
    (lambda: SiluMlp, "a class cannot be captured: got SiluMlp; need an instance of it"),
    (compiled, "a model wrapped by torch.compile"),
    (lambda: print, "only a torch.nn.Module or an ExportedProgram can be captured: got builtin_function_or_method"),
    (scripted, "a TorchScript module cannot be captured"),
]


@pytest.mark.parametrize(("make", "sentence"), REFUSED, ids=[r[1][:40] for r in REFUSED])
def test_preflight(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(CaptureError, match=sentence):
        capture(make(), (torch.randn(2, 8),))


def test_preflight_of_devices() -> None:
    with pytest.raises(CaptureError, match=r"several devices: got 'fc1.weight' on cpu, 'fc2.weight' on meta"):
        capture(half_meta(), (torch.randn(2, 8),), allow_meta=True)
    with pytest.raises(CaptureError, match=r"different device than the model: .*: got meta; need cpu"):
        capture(SiluMlp(), (torch.randn(2, 8, device="meta"),))


def data_dependent(x: torch.Tensor) -> torch.Tensor:
    if x.sum() > 0:
        return x * 2
    return x


def test_a_branch_on_data_is_quoted_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = data_dependent.__code__.co_firstlineno + 1
    with pytest.raises(CaptureError, match=rf"test_refused.py:{line}: if x.sum\(\) > 0:.*torch.where") as caught:
        capture(Function(data_dependent), (torch.randn(3, 4),))
    assert "depends on tensor values" in str(caught.value)
    assert capsys.readouterr().err == ""


def broken(x: torch.Tensor) -> torch.Tensor:
    return x @ torch.ones(3, 3)


def test_any_other_failure_is_one_sentence_with_the_users_line() -> None:
    line = broken.__code__.co_firstlineno + 1
    with pytest.raises(
        CaptureError, match=rf"cannot be traced: got RuntimeError: .*test_refused.py:{line}: return x @"
    ):
        capture(Function(broken), (torch.randn(5, 4),))


class Condition(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x * 3, (x,))


def test_control_flow_operators_are_refused_with_the_users_line() -> None:
    model = Condition().eval()
    with pytest.raises(CaptureError, match=r"control flow with sub-graphs .*got cond \(in .*test_refused.py"):
        capture(model, (torch.randn(3, 4),))


@dataclass
class Hidden:
    y: torch.Tensor


class Rescales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> Any:
        self.w.mul_(2)
        return x * self.w


def test_results_that_a_graph_cannot_return() -> None:
    with pytest.raises(
        CaptureError, match=r"torch.export cannot flatten: got \S*Hidden. Call torch.export.register_dataclass"
    ):
        capture(Function(Hidden), (torch.randn(3, 4),))
    model = Rescales().eval()
    with pytest.raises(CaptureError, match=r"changes a parameter in forward: got w. .* call it once before"):
        capture(model, (torch.randn(3, 4),))
    assert torch.equal(model.w, torch.ones(4))


def test_an_unknown_value_of_dynamic_shapes() -> None:
    with pytest.raises(CaptureError, match="got 'dynamic'; need 'auto' or None"):
        capture(SiluMlp(), (torch.randn(2, 8),), dynamic_shapes="dynamic")
