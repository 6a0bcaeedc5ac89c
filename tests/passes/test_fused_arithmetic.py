"""The fusing passes on random arithmetic around matmuls and quantizations: no bit of any result changes."""

from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

import qcompiler.schemes.named  # noqa: F401  (makes the passes known)
from qcompiler.interpreter import interpret
from qcompiler.ir import DType, Graph, TensorType, Value
from qcompiler.ir.formats import FP8_BLOCK, FP8_TILE
from qcompiler.pass_manager.instruments import CheckChanged
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.testing import random_inputs, verified

FUSING = "fuse-norm-quantize; fuse-activation-quantize; fuse-epilogue"
TILES = replace(FP8_TILE, scale_layout="col_major")


class Arithmetic:
    """Random arithmetic on rows, matmuls and quantizations, without operations whose results vary in torch."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.graph = Graph("arithmetic")
        self.dtype = self.rng.choice((DType.bf16, DType.f32))
        self.columns = self.rng.choice((128, 256, 192))
        self.rows: tuple[int, ...] = self.rng.choice(((16,), (2, 8)))
        self.values = [self.graph.add_input(name, self.kind()) for name in ("x", "r")]
        self.vector = self.param("gain", self.dtype, self.columns)
        self.codes: list[Value] = []
        self.results: list[Value] = []
        steps = (self.one, self.one, self.two, self.two, self.scaled, self.norm, self.cast, self.quantize, self.linear)
        for _ in range(self.rng.randint(8, 30)):
            self.rng.choice(steps)()
        self.quantize()
        self.graph.set_outputs([*self.results, *self.rng.sample(self.values, 1)])

    def kind(self, dtype: DType | None = None) -> TensorType:
        return TensorType(dtype or self.dtype, (*self.rows, self.columns))

    def param(self, name: str, dtype: DType, *shape: int) -> Value:
        name = self.graph.fresh(name)
        kind = TensorType(dtype, shape)
        return self.graph.append("core.param", attrs={"name": name}, types=[kind], names=[name]).result

    def value(self, dtype: DType | None = None) -> Value:
        """A tensor with some number of rows, preferably a recent one."""
        known = [value for value in self.values if value.tensor.dtype is (dtype or self.dtype)]
        return self.rng.choice(known[-3:] if self.rng.random() < 0.8 else known)

    def add(self, name: str, *args: Any, dtype: DType | None = None, **attrs: Any) -> None:
        self.values.append(self.graph.append(name, *args, types=[self.kind(dtype)], attrs=attrs).result)

    def one(self) -> None:
        name = self.rng.choice(("silu", "relu", "tanh", "sigmoid", "neg", "gelu"))
        self.add(f"aten.{name}", self.value())

    def two(self) -> None:
        self.add(f"aten.{self.rng.choice(('add', 'sub', 'mul'))}.Tensor", self.value(), self.value())

    def scaled(self) -> None:
        x, number = self.value(), self.rng.choice((0.3, 2, self.vector))
        swapped = number is self.vector and self.rng.random() < 0.5
        self.add("aten.mul.Tensor", *((number, x) if swapped else (x, number)))

    def norm(self) -> None:
        self.add("aten.rms_norm", self.value(), (self.columns,), self.vector, 1e-6)

    def cast(self) -> None:
        self.add("aten._to_copy", self.value(), dtype=DType.f32)
        wide = self.values.pop()
        narrow = self.graph.append("aten._to_copy", wide, types=[self.kind()], attrs={"dtype": self.dtype}).result
        self.values.append(narrow)

    def quantize(self) -> None:
        codes = self.graph.append("kernel.quantize", self.value(), attrs={"format": TILES})
        self.codes = [*codes.results]
        self.results.append(codes.results[0])

    def linear(self) -> None:
        if not self.codes:
            return
        w = self.param("w", DType.f8e4m3fn, self.columns, self.columns)
        blocks = (self.columns + 127) // 128
        scale = self.param("s", DType.f32, blocks, blocks)
        attrs: dict[str, Any] = {"out_dtype": self.dtype, "w_format": FP8_BLOCK, "x_format": TILES}
        self.values.append(self.graph.append("kernel.scaled_linear", *self.codes, w, scale, attrs=attrs).result)


def same(got: Any, want: Any) -> bool:
    """Equal bits, with NaN in the same places."""
    if not isinstance(got, Tensor):
        return bool(got == want)
    return got.dtype is want.dtype and torch.equal(got.float().nan_to_num(7.0), want.float().nan_to_num(7.0))


def run(seed: int) -> tuple[Graph, Graph]:
    """A graph before and after fusing, with weights."""
    before = Arithmetic(seed).graph
    before.verify()
    _, weights = random_inputs(before, seed)
    before.weights = {name: (t.float() / 16).to(t.dtype) if name[0] == "w" else t for name, t in weights.items()}
    after = before.clone()
    run_pipeline(Pipeline.parse(FUSING), after, instruments=[CheckChanged()])
    return before, after


@pytest.mark.parametrize("seed", range(40))
def test_bits_do_not_change(seed: int) -> None:
    before, after = run(seed)
    inputs, _ = random_inputs(before, seed)
    assert all(map(same, interpret(verified(after), inputs), interpret(before, inputs)))
    text = str(after)
    done = run_pipeline(Pipeline.parse(FUSING), after)
    assert str(after) == text
    # Each remaining quantization and matmul has a reason.
    for name, step in (("kernel.quantize", "fuse-activation-quantize"), ("kernel.scaled_linear", "fuse-epilogue")):
        assert {op.results[0].name for op in after.ops(name)} == done.skipped[step].keys()


def test_most_operations_are_fused() -> None:
    counts: Counter[str] = Counter()
    for seed in range(20):
        before, after = run(seed)
        counts.update(f"before {op.name}" for op in before.ops())
        counts.update(op.name for op in after.ops())
        counts.update(f"keeps {len(op.attrs['keep'])}" for op in after.ops("kernel.fused_quantize"))  # type: ignore[arg-type]  # names
    assert counts["kernel.fused_quantize"] > counts["kernel.quantize"]
    assert counts["kernel.fused_linear"] > 5
    assert all(counts[f"keeps {kept}"] for kept in (0, 1, 2))
