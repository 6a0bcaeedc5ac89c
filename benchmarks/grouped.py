"""Grouped GEMM for mixtures of experts, compared with a loop of dense GEMMs and with bfloat16.

    python benchmarks/grouped.py [--out FOLDER]

Projections of two models at several numbers of tokens, routed evenly and by Zipf's law. The loop runs our own dense
GEMM once per expert that has tokens; it gets the group sizes, which a program would have to wait for, and operands that
are already split. bfloat16 is torch's grouped GEMM. All variants alternate in CUDA graphs. The error is relative to the
loop, whose GEMMs have their own tests. The masked kernel reserves for each group as many rows as the largest group has.
"eager" is the median of single calls with the device idle before each, including Python launch overhead and, for the
loop, the wait for the group sizes: a CUDA graph cannot hold a loop whose sizes only the device knows.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import torch
from torch import Tensor

import codegen.torch_ops  # noqa: F401  (registers the operators)
from codegen.launching.timing import in_turns
from codegen.targets.hopper import HOPPER
from codegen.templates.grouped import GROUPED_GEMM, GroupedProblem

try:
    import deep_gemm
except ImportError:
    deep_gemm = None

E4M3 = torch.float8_e4m3fn
TILES = ([1, 128], [128, 128])
TOKENS = (64, 1024, 8192)
MASKED_TOKENS = 1024
"""The masked kernel is measured up to this many tokens: its padding grows with the largest group."""


@dataclass(frozen=True)
class Projection:
    """One projection of a mixture of experts, `[experts, n, k]`, and the number of experts per token."""

    model: str
    experts: int
    top: int
    n: int
    k: int


PROJECTIONS = (
    Projection("DeepSeek-V3 gate, up", 256, 8, 4096, 7168),
    Projection("DeepSeek-V3 down", 256, 8, 7168, 2048),
    Projection("Mixtral gate or up", 8, 2, 14336, 4096),
    Projection("Mixtral down", 8, 2, 4096, 14336),
)


class Weights:
    """The weights of a projection, in FP8 and in bfloat16."""

    def __init__(self, shape: Projection) -> None:
        sizes = shape.experts, shape.n, shape.k
        self.codes = torch.empty(sizes, dtype=E4M3, device="cuda")
        self.wide = torch.empty(sizes, dtype=torch.bfloat16, device="cuda")
        for codes, wide in zip(self.codes, self.wide, strict=True):
            codes.copy_(wide.normal_())
        self.scales = torch.rand(shape.experts, -(-shape.n // 128), -(-shape.k // 128), device="cuda") + 0.5


class Operands:
    """One routing of some tokens, and a launch of each kernel."""

    def __init__(self, shape: Projection, weights: Weights, counts: Tensor) -> None:
        self.shape, self.weights, rows = shape, weights, int(counts.sum())
        self.offsets = counts.cumsum(0).to(torch.int32)
        self.wide = torch.randn(rows, shape.k, device="cuda", dtype=torch.bfloat16)
        self.x, self.xs = quantized(self.wide)
        self.sizes = counts.tolist()
        parts = zip(self.wide.split(self.sizes), weights.codes, weights.scales, strict=True)
        self.parts = [(*quantized(x), w, ws) for x, w, ws in parts if len(x)]
        self.counts = counts.to(torch.int32)

    def ours(self) -> Tensor:
        w, ws = self.weights.codes, self.weights.scales
        return torch.ops.qcompiler.grouped_linear(self.x, self.xs, w, ws, self.offsets, *TILES, torch.bfloat16)

    def loop(self) -> list[Tensor]:
        linear = torch.ops.qcompiler.scaled_linear
        return [linear(x, xs, w, ws, None, *TILES, torch.bfloat16) for x, xs, w, ws in self.parts]

    def loop_of_sizes(self) -> list[Tensor]:
        """The loop as a program runs it if it must ask the device for the sizes."""
        self.counts.tolist()
        return self.loop()

    def bf16(self) -> Tensor:
        return torch._grouped_mm(self.wide, self.weights.wide.transpose(-2, -1), offs=self.offsets)

    def masked(self) -> Callable[[], Tensor]:
        room, expected = max(self.sizes), round(statistics.mean(self.sizes))
        x, xs = quantized(torch.randn(self.shape.experts, room, self.shape.k, device="cuda", dtype=torch.bfloat16))
        w, ws, linear = self.weights.codes, self.weights.scales, torch.ops.qcompiler.grouped_linear_masked
        return lambda: linear(x, xs, w, ws, self.counts, *TILES, torch.bfloat16, expected)

    def deepgemm(self) -> Callable[[], Tensor]:
        """DeepGEMM's kernel, whose groups start at multiples of 128 rows."""
        padded = [-(-size // 128) * 128 for size in self.sizes]
        rows = torch.zeros(sum(padded), self.shape.k, device="cuda", dtype=torch.bfloat16)
        for target, source in zip(rows.split(padded), self.wide.split(self.sizes), strict=True):
            target[: len(source)] = source
        group = torch.arange(len(padded), device="cuda", dtype=torch.int32)
        group = group.repeat_interleave(torch.tensor(padded, device="cuda"))
        out = torch.empty(len(rows), self.shape.n, device="cuda", dtype=torch.bfloat16)
        right = self.weights.codes, self.weights.scales
        x = quantized(rows)
        return lambda: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(x, right, out, group, disable_ue8m0_cast=True)


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles made as in a compiled model."""
    codes, scales = torch.ops.qcompiler.quantize(x, [1, 128], E4M3, "deepseek", "col_major")
    return codes, scales


def routed(shape: Projection, tokens: int, exponent: float) -> Tensor:
    """Tokens per expert if the popularity of the r-th expert is r to the power of -exponent."""
    popularity = torch.arange(1, shape.experts + 1, device="cuda").float().pow(-exponent)
    popularity = popularity[torch.randperm(shape.experts, device="cuda")]
    chosen = popularity.expand(tokens, -1).multinomial(shape.top)
    return chosen.flatten().bincount(minlength=shape.experts)


def measure(shape: Projection, weights: Weights, tokens: int, exponent: float) -> dict[str, Any]:
    """One row of the table."""
    given = Operands(shape, weights, routed(shape, tokens, exponent))
    error = harness.relative_error(given.ours(), torch.cat(given.loop()))
    launches: dict[str, Callable[[], object]] = {"ours": given.ours, "loop": given.loop, "bf16": given.bf16}
    if tokens <= MASKED_TOKENS:
        launches["masked"] = given.masked()
    if deep_gemm is not None:
        launches["deepgemm"] = given.deepgemm()
    times = in_turns({name: [launch] for name, launch in launches.items()}, budget=6.0, most=200)
    rows, ours = tokens * shape.top, times["ours"]
    return {
        "model": shape.model,
        "experts, N, K": f"{shape.experts}, {shape.n}, {shape.k}",
        "tokens": tokens,
        "routing": "Zipf" if exponent else "even",
        "largest group": max(given.sizes),
        "us, loop of dense": times["loop"],
        "us, bf16 grouped": times["bf16"],
        "us, DeepGEMM": times.get("deepgemm"),
        "us, qcompiler": ours,
        "us, qcompiler masked": times.get("masked"),
        "x loop": times["loop"] / ours,
        "us, loop, eager": (loop := harness.eager(given.loop_of_sizes) * 1e3),
        "us, qcompiler, eager": (alone := harness.eager(given.ours) * 1e3),
        "x loop, eager": loop / alone,
        "x bf16": times["bf16"] / ours,
        "TFLOP/s": 2 * rows * shape.n * shape.k / ours / 1e6,
        "TB/s of weights": len(given.parts) * shape.n * shape.k / ours / 1e6,
        "error": error,
        "configuration": str(GROUPED_GEMM.family(HOPPER).choose(GroupedProblem(rows / shape.experts, shape.experts))),
    }


def main() -> None:
    harness.arguments()
    torch.manual_seed(0)
    rows = []
    for shape in PROJECTIONS:
        weights = Weights(shape)
        rows += [measure(shape, weights, tokens, exponent) for tokens in TOKENS for exponent in (0.0, 1.0)]
        del weights
    title = "Grouped FP8 GEMM, 1x128 and 128x128 scales, bfloat16 out: warm CUDA-graph replay, interleaved"
    harness.gpu_report("grouped", title, rows)


if __name__ == "__main__":
    main()
