"""The 8-bit products beside bfloat16 and the vendor's kernels of the same kind, in one run.

    python benchmarks/gemm.py [--out FOLDER]

Two tables: 1x128 and 128x128 scales, and the other granularities. TFLOP/s of the same product on the same operands; the
error is against the FP32 product of the quantized operands. In the first table the kernels of a row take turns, because
a device at its power limit gives whoever comes first the higher clock, and few rows are measured again with weights
that come from memory: a turn through so many that the cache holds none.
"""

import statistics
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch.nn import functional

import codegen.torch_ops  # noqa: F401  (registers the operators)
from codegen.gemm_config import GemmProblem
from codegen.gemm_launch import launch_gemm
from codegen.tiling import bucket, choose
from qcompiler import numerics

SHAPES = (
    (64, 4096, 7168), (128, 4096, 7168), (128, 7168, 2048), (512, 4096, 4096), (4096, 2048, 7168), (4096, 24576, 1536),
    (4096, 32768, 512), (4096, 7168, 16384), (4096, 4096, 7168), (4096, 7168, 2048), (4096, 4096, 4096),
    (8192, 8192, 8192),
)  # fmt: skip

# Of Llama-3-8B (q, k and v; output; gate and up; down) and DeepSeek-V3 (two projections of its attention; experts).
LAYERS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (2112, 7168), (24576, 1536), (4096, 7168))
MODEL_SHAPES = tuple((m, n, k) for m in (1, 16, 64, 128, 1024, 8192) for n, k in LAYERS)

FEW_ROWS, COLD_BYTES = 128, 160_000_000
"""Up to how many rows the weights are what takes time, and how many bytes of them the cache cannot hold."""


def measure(m: int, n: int, k: int) -> dict[str, Any]:
    """One row of the table."""
    first = _Operands(m, n, k)
    want = numerics.scaled_linear(first.x, first.xs, first.w, first.ws, out_dtype=torch.float32)
    error = harness.relative_error(first.ours(), want)
    try:
        vendor_error = harness.relative_error(first.vendor(), want)
    except (RuntimeError, ValueError):  # not for every number of rows
        vendor_error = None
    del want
    launches = {"bf16": [first.bf16], "plain": [first.plain], "ours": [first.ours]}
    if vendor_error is not None:
        launches["vendor"] = [first.vendor]
    work = 2 * m * n * k / 1e9
    speed = {name: work / time for name, time in _in_turns(launches).items()}
    row = {
        "M, N, K": f"{m}, {n}, {k}",
        "bf16 cuBLAS": speed["bf16"],
        "cuBLAS 1x128/128x128": speed.get("vendor"),
        "portable kernels": speed["plain"],
        "qcompiler": speed["ours"],
        "x bf16": speed["ours"] / speed["bf16"],
        "x cuBLAS": speed["ours"] / speed["vendor"] if "vendor" in speed else None,
    }
    cold: dict[str, float] = {}
    if m <= FEW_ROWS:
        others = [first] + [_Operands(m, n, k) for _ in range(COLD_BYTES // (n * k))]
        launches = {"ours": [each.ours for each in others]}
        if vendor_error is not None:
            launches["vendor"] = [each.vendor for each in others]
        cold = _in_turns(launches)
    return row | {
        "cold us, cuBLAS": 1e3 * cold["vendor"] if "vendor" in cold else None,
        "cold us, qcompiler": 1e3 * cold["ours"] if cold else None,
        "TB/s of weights": n * k / cold["ours"] / 1e9 if cold else None,
        "error": error,
        "cuBLAS error": vendor_error,
        "configuration": str(first.config),
    }


class _Operands:
    """One product, and how each kernel makes it."""

    def __init__(self, m: int, n: int, k: int) -> None:
        e4m3 = torch.float8_e4m3fn
        self.left = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        self.right = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        self.x, self.xs = torch.ops.qcompiler.quantize(self.left, [1, 128], e4m3, "deepseek", "col_major")
        self.w, self.ws = torch.ops.qcompiler.quantize(self.right, [128, 128], e4m3, "deepseek", "row_major")
        self.out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
        self.config = choose(GemmProblem(bucket(m), n, k))
        self.portable = choose(GemmProblem(bucket(m), n, k, scale_columns=False))

    def bf16(self) -> torch.Tensor:
        return torch.mm(self.left, self.right.T)

    def ours(self) -> torch.Tensor:
        launch_gemm(self.config, self.x, self.w, self.out, self.xs, self.ws, None)
        return self.out

    def plain(self) -> torch.Tensor:
        launch_gemm(self.portable, self.x, self.w, self.out, self.xs, self.ws, None)
        return self.out

    def vendor(self) -> torch.Tensor:
        kind = functional.ScalingType
        return functional.scaled_mm(
            self.x, self.w.T, self.xs, kind.BlockWise1x128, self.ws.t(), kind.BlockWise128x128,
            output_dtype=torch.bfloat16,
        )  # fmt: skip


def _in_turns(
    launches: dict[str, list[Callable[[], object]]], rounds: int = 5, budget: float = 6.0
) -> dict[str, float]:
    """Milliseconds of one launch of each, the median over rounds in which each replays a graph of `budget` ms."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graphs = {}
    for name, turn in launches.items():
        for launch in turn:
            launch()
        start.record()
        for launch in turn:
            launch()
        stop.record()
        torch.cuda.synchronize()
        repeats = max(1, min(400 // len(turn), int(budget / max(start.elapsed_time(stop), 1e-3))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                for launch in turn:
                    launch()
        graph.replay()
        graphs[name] = graph, repeats * len(turn)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, count) in graphs.items():
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(stop) / count)
    return {name: statistics.median(each) for name, each in times.items()}


GRANULARITIES = {
    "FP8 [1, 32]": ((1, 32), (128, 128), torch.float8_e4m3fn),
    "FP8 [1, 64]": ((1, 64), (128, 128), torch.float8_e4m3fn),
    "FP8 [1, 256]": ((1, 256), (128, 128), torch.float8_e4m3fn),
    "FP8 token x block": ((1, -1), (128, 128), torch.float8_e4m3fn),
    "FP8 token x channel": ((1, -1), (1, -1), torch.float8_e4m3fn),
    "FP8 tensor x tensor": ((-1, -1), (-1, -1), torch.float8_e4m3fn),
    "INT8 token x channel": ((1, -1), (1, -1), torch.int8),
}


def measure_granularities(m: int, n: int, k: int) -> dict[str, Any]:
    """One row of the second table: the operators as a compiled model calls them, and the worst of their errors."""
    left = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    work, worst = 2 * m * n * k / 1e9, 0.0
    row: dict[str, Any] = {"M, N, K": f"{m}, {n}, {k}"}
    row["bf16 cuBLAS"] = work / harness.milliseconds(lambda: torch.mm(left, right.T))
    for name, (x_block, w_block, dtype) in GRANULARITIES.items():
        layout = "col_major" if x_block[0] == 1 else "row_major"
        x, xs = torch.ops.qcompiler.quantize(left, x_block, dtype, "deepseek", layout)
        w, ws = torch.ops.qcompiler.quantize(right, w_block, dtype, "deepseek", "row_major")
        arguments = (x, xs, w, ws, None, x_block, w_block, torch.bfloat16)
        want = numerics.scaled_linear(x, xs, w, ws, x_block=x_block, w_block=w_block, out_dtype=torch.float32)
        worst = max(worst, harness.relative_error(torch.ops.qcompiler.scaled_linear(*arguments), want))
        del want
        row[name] = work / harness.milliseconds(lambda given=arguments: torch.ops.qcompiler.scaled_linear(*given))
        if name == "FP8 token x channel":
            row["cuBLAS FP8 token x channel"] = work / harness.milliseconds(
                lambda x=x, w=w, xs=xs, ws=ws: torch._scaled_mm(x, w.T, xs, ws.T, out_dtype=torch.bfloat16)
            )
        if name == "INT8 token x channel":
            row["cuBLAS INT8, int32 out"] = work / harness.milliseconds(lambda x=x, w=w: torch._int_mm(x, w.T))
    return row | {"worst error": worst}


def main() -> None:
    harness.arguments()
    torch.manual_seed(0)
    rows = [measure(*shape) for shape in (*SHAPES, *MODEL_SHAPES)]
    title = "FP8 GEMM, 1x128 and 128x128 scales, bfloat16 out: TFLOP/s by warm CUDA-graph replay, in turns"
    harness.report("h200-gemm", title, rows, harness.machine())
    rows = [measure_granularities(*shape) for shape in SHAPES]
    title = "8-bit GEMM of other granularities, bfloat16 out: TFLOP/s by warm CUDA-graph replay"
    harness.report("h200-gemm-granularities", title, rows, harness.machine())


if __name__ == "__main__":
    main()
