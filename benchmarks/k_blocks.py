"""GEMM throughput for each tile width of the activation: TFLOP/s per `k_block`, as CSV.

    python benchmarks/k_blocks.py [--csv FILE]

    k_block,size,tflops         k_block -1 is all of K; size is M = N = K

FP8, weights in blocks of 128 x 128, bfloat16 out; `GEMM.family(HOPPER).choose` picks the kernel for each width. Widths
alternate in CUDA-graph replays, so they share the device's power limit. `examples/granularity_study.py` plots the file
together with the error at each width.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import harness
import torch

import codegen.torch_ops  # noqa: F401  (registers the operators)
from codegen.launching.timing import in_turns
from codegen.targets.hopper import HOPPER
from codegen.templates.gemm import GEMM, GemmOperands, GemmProblem
from qcompiler import numerics

K_BLOCKS = (32, 64, 128, 256, 512, numerics.ALL)
SIZES = (4096, 8192)
CSV = Path(__file__).parents[1] / "docs" / "granularity" / "throughput.csv"
ROUNDS = 15


def measure(size: int) -> dict[int, float]:
    """TFLOP/s at each width, median over rounds."""
    launches = {k_block: _launch(size, k_block) for k_block in K_BLOCKS}
    times = in_turns({k_block: [launch] for k_block, launch in launches.items()}, rounds=ROUNDS)
    return {k_block: 2 * size**3 / 1e6 / time for k_block, time in times.items()}


def _launch(size: int, k_block: int) -> Callable[[], object]:
    """One GEMM with its own operands; checks its result first."""
    e4m3 = torch.float8_e4m3fn
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x, xs = torch.ops.qcompiler.quantize(left, [1, k_block], e4m3, "deepseek", "col_major")
    w, ws = torch.ops.qcompiler.quantize(right, [128, 128], e4m3, "deepseek", "row_major")
    out = torch.empty(size, size, device="cuda", dtype=torch.bfloat16)
    config = GEMM.family(HOPPER).choose(GemmProblem(size, size, size, x_block=k_block))
    operands = GemmOperands(x, w, out, xs, ws, x_block=k_block)
    GEMM.family(HOPPER).launch(config, operands)
    some = slice(0, 256)
    want = numerics.scaled_linear(
        x[some],
        xs[some],
        w,
        ws,
        x_format=numerics.format_of((1, k_block), x[some].dtype),
        w_format=numerics.format_of((128, 128), w.dtype),
        out_dtype=torch.float32,
    )
    error = harness.relative_error(out[some], want)
    print(f"{size}, k_block {k_block}: {config}, error {error:.2e}", flush=True)
    return lambda: GEMM.family(HOPPER).launch(config, operands)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--csv", type=Path, default=CSV, help="the file to write")
    path = parser.parse_args().csv
    torch.manual_seed(0)
    speeds = {size: measure(size) for size in SIZES}
    lines = [f"{k_block},{size},{speeds[size][k_block]:.1f}" for size in SIZES for k_block in K_BLOCKS]
    text = "\n".join(["k_block,size,tflops", *lines, ""])
    harness.write(path, text)
    print(text, *(f"{key} {value}" for key, value in harness.machine().items()))


if __name__ == "__main__":
    main()
