"""Instruments: they see every pass, and they catch those that lie."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from qcompiler.errors import PassError
from qcompiler.ir import DType, Graph, TensorType
from qcompiler.pass_manager.instruments import (
    CheckChanged,
    Dump,
    Instrument,
    Outcome,
    PrintAfter,
    TimePasses,
    Validate,
    within,
)
from qcompiler.pass_manager.pipeline import Effect, Pass, Pipeline
from qcompiler.pass_manager.runner import run_pipeline

TEXT = """func @m(%x: f32[4, 16]) -> (f32[4, 16]) {
  %w = core.param() {name = "w"} : f32[16, 16]
  %h = aten.linear(%x, %w) : f32[4, 16] loc("m.py":2)
  %r = aten.relu(%h) : f32[4, 16] loc("m.py":3)
  %y = aten.neg(%r) : f32[4, 16]
  return %y
}"""


def graph() -> Graph:
    made = Graph.parse(TEXT)
    made.weights = {"w": torch.randn(16, 16, generator=torch.Generator().manual_seed(0))}
    return made


@dataclass(frozen=True)
class Scale(Pass):
    """relu(x)  ->  relu(x) * by"""

    name: ClassVar[str] = "test-scale"

    by: float = 2.0
    says: bool = True

    def run(self, graph: Graph) -> bool:
        relu = graph["r"].op
        last = graph["y"].op
        scaled = graph.insert(last, "aten.mul.Scalar", relu.result, self.by, types=[relu.result.type], names=["s"])
        graph.replace_in(last, relu.result, scaled.result)
        graph.rename(relu.result, "unscaled")
        graph.rename(scaled.result, "r")
        return self.says


class Reorders(Scale):
    """The same, with another declaration."""

    effect = Effect.REORDERS


class Lossy(Scale):
    """The same, with another declaration."""

    effect = Effect.LOSSY
    budget = 0.1


class Fewer(Scale):
    """graph  ->  without outputs"""

    def run(self, graph: Graph) -> bool:
        graph.set_outputs(())
        return True


class Retyped(Scale):
    """f32  ->  f64"""

    def run(self, graph: Graph) -> bool:
        kind = TensorType(DType.f64, (4, 16))
        op = graph.append("aten._to_copy", graph["y"], attrs={"dtype": kind.dtype}, types=[kind])
        graph.set_outputs((op.result,))
        return True


INPUTS = [torch.randn(4, 16, generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            Scale(),
            "pass 'test-scale' violates its declared effect 'exact': got a relative error of 1 in output 0; "
            "need equal bits (in %r = aten.mul.Scalar, the first operation that differs)",
        ),
        (
            Reorders(1.001),
            "pass 'test-scale{by=1.001}' violates its declared effect 'reorders': got a relative error of 0.001 "
            "in output 0; need at most 2e-05 (in %r = aten.mul.Scalar, the first operation that differs)",
        ),
        (
            Lossy(1.25),
            "pass 'test-scale{by=1.25}' violates its declared effect 'lossy': got a relative error of 0.25 in "
            "output 0; need at most 0.1 (in %r = aten.mul.Scalar, the first operation that differs)",
        ),
        (
            Fewer(),
            "pass 'test-scale' changes the outputs or updates of the graph: got output 0 is missing; "
            "need the same outputs and updates",
        ),
        (
            Retyped(),
            "pass 'test-scale' violates its declared effect 'exact': got f64[4, 16] instead of f32[4, 16] "
            "in output 0; need equal bits (in output 0, the first operation that differs)",
        ),
    ],
    ids=["exact", "reorders", "lossy", "fewer outputs", "another type"],
)
def test_validate_catches_a_lie(step: Pass, message: str) -> None:
    with pytest.raises(PassError) as error:
        run_pipeline(Pipeline((step,)), graph(), instruments=[Validate()], inputs=INPUTS)
    assert str(error.value) == message


@pytest.mark.parametrize("step", [Scale(1.0), Reorders(1.000001), Lossy(1.05)])
def test_validate_lets_the_truth_pass(step: Pass) -> None:
    validate = Validate()
    run_pipeline(Pipeline((step,)), graph(), instruments=[validate], inputs=INPUTS)
    assert 0 <= validate.errors["test-scale"] < 0.06


def test_validate_runs_a_whole_scheme() -> None:
    validate = Validate()
    steps = "canonicalize; dead-code; fp8-tile; share-quantize; fuse-linear; fold-constants; dead-code; to-kernels"
    run_pipeline(Pipeline.parse(steps), graph(), instruments=[validate, CheckChanged()], inputs=INPUTS)
    assert 0 < validate.errors.pop("fp8-tile") < 0.06
    assert set(validate.errors.values()) == {0.0}


def test_validate_draws_the_same_random_numbers_each_time() -> None:
    text = "func @m(%x: f32[9]) -> (f32[9]) {\n  %d = aten.dropout(%x, 0.5, true) : f32[9]\n  return %d\n}"
    state = torch.get_rng_state()
    run_pipeline(Pipeline.parse("dead-code"), Graph.parse(text), instruments=[Validate()], inputs=[torch.ones(9)])
    assert torch.equal(torch.get_rng_state(), state)


def test_validate_needs_inputs() -> None:
    with pytest.raises(PassError, match="needs real inputs"):
        run_pipeline(Pipeline(), graph(), instruments=[Validate()])


def test_validate_sees_updates() -> None:
    text = (
        'func @m(%x: f32[4]) -> () {\n  %s = core.buffer() {name = "s"} : f32[4]\n'
        "  %r = aten.add.Tensor(%s, %x) : f32[4]\n  %y = aten.neg(%r) : f32[4]\n  core.update(%s, %y)\n  return\n}"
    )
    made = Graph.parse(text)
    made.weights = {"s": torch.ones(4)}
    with pytest.raises(PassError, match="got a relative error of 1 in the update of %s"):
        run_pipeline(Pipeline((Scale(),)), made, instruments=[Validate()], inputs=[torch.ones(4)])


@pytest.mark.parametrize(
    ("old", "new", "limit", "close"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0]), None, False),
        (torch.tensor([0.0]), torch.tensor([-0.0]), 0.0, True),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]), 0.0, True),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 1.0]), 0.5, False),
        (torch.tensor([float("inf")]), torch.tensor([-float("inf")]), 0.5, False),
        (torch.zeros(2), torch.ones(2), 0.5, False),
        (torch.zeros(0), torch.zeros(0), None, True),
        (torch.tensor(True), torch.tensor(False), None, False),
        (torch.tensor([1 + 1j]), torch.tensor([1 + 1j]), 0.0, True),
        (3, 3, None, True),
        (3, 4, 0.5, False),
        (float("nan"), float("nan"), None, True),
        (None, None, None, True),
        (None, torch.ones(1), None, False),
    ],
)
def test_within(old: Any, new: Any, limit: float | None, close: bool) -> None:
    assert within(old, new, limit) is close


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Scale(says=False), r"pass 'test-scale\{says=false\}' changed the graph but returned False"),
        (Pass.parse("dead-code"), None),
    ],
)
def test_check_changed(step: Pass, message: str | None) -> None:
    if message is None:
        run_pipeline(Pipeline((step,)), graph(), instruments=[CheckChanged()])
        return
    with pytest.raises(PassError, match=message):
        run_pipeline(Pipeline((step,)), graph(), instruments=[CheckChanged()])


def test_check_changed_of_a_boast() -> None:
    class Boast(Scale):
        """graph  ->  graph"""

        def run(self, graph: Graph) -> bool:
            return True

    with pytest.raises(PassError, match="did not change the graph but returned True"):
        run_pipeline(Pipeline((Boast(),)), graph(), instruments=[CheckChanged()])


def test_dump_is_numbered_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "07_old-pass.qir").write_text("stale")
    (folder / "mine.qir").write_text("mine")
    run_pipeline(
        Pipeline.parse("canonicalize; fp8-tile; dead-code; dead-code"), made := graph(), instruments=[Dump(folder)]
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "00_captured.qir", "01_canonicalize.qir", "02_fp8-tile.qir", "03_dead-code.qir", "04_dead-code.qir", "mine.qir",
    ]  # fmt: skip
    assert (folder / "00_captured.qir").read_text() == f"{TEXT}\n"
    assert (folder / "04_dead-code.qir").read_text() == f"{made}\n"


def test_dump_to_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PassError, match="graphs cannot be dumped"):
        run_pipeline(Pipeline(), graph(), instruments=[Dump(tmp_path / "file")])


def test_time_passes() -> None:
    out = io.StringIO()
    times = TimePasses(out)
    run_pipeline(
        Pipeline.parse(
            'dead-code; fp8-tile{x_format=#fp8_tile<profile = "vllm">, w_format=#fp8_block<profile = "vllm">}'
        ),
        graph(),
        instruments=[times],
    )
    assert [(name, changed) for name, _, changed in times.rows] == [
        ("dead-code", False),
        ('fp8-tile{x_format=#fp8_tile<profile = "vllm">, w_format=#fp8_block<profile = "vllm">}', True),
    ]
    lines = out.getvalue().splitlines()
    assert lines[0].endswith(" ms  -        dead-code")
    assert lines[1].endswith(
        ' ms  changed  fp8-tile{x_format=#fp8_tile<profile = "vllm">, w_format=#fp8_block<profile = "vllm">}'
    )
    assert lines[2].endswith(" total")


def test_print_after() -> None:
    out = io.StringIO()
    steps = Pipeline.parse("dead-code; fp8-tile")
    run_pipeline(steps, graph(), instruments=[PrintAfter("dead-code", file=out)])
    assert out.getvalue() == f"// ----- after dead-code -----\n{TEXT}\n"
    everything = io.StringIO()
    run_pipeline(steps, graph(), instruments=[PrintAfter("all", file=everything)])
    assert everything.getvalue().count("// ----- after ") == 2
    with pytest.raises(PassError, match=r"no such pass: got 'ded-code'. Did you mean 'dead-code'?"):
        PrintAfter("ded-code")


def test_the_order_of_calls() -> None:
    calls: list[str] = []

    class Log(Instrument):
        def begin(self, graph: Graph, inputs: Sequence[Any] | None) -> None:
            calls.append(f"begin {inputs}")

        def before(self, step: Pass, graph: Graph) -> None:
            calls.append(f"before {step}")

        def after(self, step: Pass, graph: Graph, outcome: Outcome) -> None:
            calls.append(f"after {step} {outcome.changed} {outcome.seconds >= 0}")

        def end(self, graph: Graph) -> None:
            calls.append("end")

    run_pipeline(Pipeline.parse("dead-code"), graph(), instruments=[Instrument(), Log()], inputs=[1])
    assert calls == ["begin [1]", "before dead-code", "after dead-code False True", "end"]
