"""`compiled.warmup` and `compiled.tune` on a Hopper GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hopper_kernels import choose
from torch import Tensor

import qcompiler
from codegen.gemm import tuned
from codegen.gemm.tuner import candidates
from codegen.launching import launch as launching
from codegen.launching import replay
from codegen.targets.hopper import HOPPER
from codegen.templates.gemm import GEMM, GemmProblem
from qcompiler.compiler.model import CompiledModel
from qcompiler.errors import CodegenError

pytestmark = pytest.mark.gpu
FAMILY = GEMM.family(HOPPER)


class Mlp(torch.nn.Module):
    """Two layers, with a softmax between them: a row's sum cannot be in a GEMM's epilogue, so both are plain GEMMs."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(512, 1024)
        self.down = torch.nn.Linear(1024, 512, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x[batch, tokens, 512]."""
        y: Tensor = self.down(torch.softmax(self.up(x), dim=-1))
        return y


@pytest.fixture
def compiled() -> Iterator[CompiledModel]:
    """A model, in a process without compiled kernels."""
    kept = dict(launching._COMPILED)
    launching._COMPILED.clear()
    replay.forget()
    with torch.device("cuda"):
        model, x = Mlp().bfloat16().eval(), torch.randn(2, 8, 512, dtype=torch.bfloat16)
    yield qcompiler.compile(model, example_inputs=(x,))
    launching._COMPILED.update(kept)
    tuned._learned.clear()
    tuned.forget()


def inputs(batch: int, tokens: int) -> Tensor:
    return torch.randn(batch, tokens, 512, dtype=torch.bfloat16, device="cuda")


def test_after_a_warmup_the_first_call_can_be_captured(compiled: CompiledModel) -> None:
    told: list[tuple[int, int]] = []
    done = compiled.warmup(rows=[4, 64, 2048], progress=lambda count, of, name: told.append((count, of)))
    assert done.calls == 3 and done.note is None and len(done.kernels) == len(told) > 2
    assert told[-1] == (len(told), len(told)), str(done)
    warm = dict(launching._COMPILED)
    stream, graphs = torch.cuda.Stream(), []
    torch.zeros(1, device="cuda") @ torch.zeros(1, device="cuda")
    for tokens in (4, 64, 2048):
        x, graph = inputs(1, tokens), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = compiled(x)
        graphs.append((x, graph, y))
    assert dict(launching._COMPILED) == warm
    for x, graph, y in graphs:
        graph.replay()
        assert torch.equal(compiled(x), y)
    assert compiled.warmup(rows=[4, 64, 2048]).kernels == ()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_without_warmup_the_error_says_how(compiled: CompiledModel) -> None:
    x = inputs(2, 8)
    with pytest.raises(CodegenError, match=r"compiled\.warmup"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        compiled(x)
    compiled(x)


def test_all_usual_rows_and_combinations(compiled: CompiledModel) -> None:
    first = compiled.warmup()
    assert first.calls == 14 and first.kernels
    symbols = [str(size) for size in compiled.graph.inputs[0].tensor.shape[:2]]
    sizes: dict[str, Any] = {symbols[0]: [1, 3], symbols[1]: range(100, 1000, 300)}
    again = compiled.warmup(**sizes)
    assert again.calls == 6
    before = dict(launching._COMPILED)
    for batch in (1, 3):
        for tokens in range(100, 1000, 300):
            compiled(inputs(batch, tokens))
    assert dict(launching._COMPILED) == before


def test_tuning_is_used_here_and_on_request(compiled: CompiledModel, tmp_path: Path) -> None:
    x = inputs(2, 8)
    want = compiled(x)
    result = compiled.tune(x)
    assert len(result.gemms) == 2 and result.file is not None, str(result)
    for product in result.gemms:
        assert list(product.times) == sorted(candidates(product.problem, FAMILY), key=product.times.__getitem__)
        assert product.ratio <= 1.0 and tuned.config_for(0, product.problem) == product.best
    assert (compiled(x).float() - want.float()).norm() <= 1e-2 * want.float().norm()
    entries = json.loads(Path(result.file).read_text())["gemms"]
    assert {entry["problem"]["n"] for entry in entries} >= {512, 1024}
    # An impossible measurement shows whether another process reads the file.
    problem = GemmProblem(16, 1024, 512, torch.cuda.get_device_properties(0).multi_processor_count)
    other = next(config for config in candidates(problem, FAMILY)[::-1] if config != choose(problem))
    tuned.learn(0, {problem: other})
    script = (
        f"from codegen.templates.gemm import *; from codegen.gemm import tuned; print(tuned.config_for(0, {problem!r}))"
    )
    for variable, expected in (("1", other), ("0", choose(problem))):
        environment = {**os.environ, "QCOMPILER_TUNED": variable}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == str(expected)
