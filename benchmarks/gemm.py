"""The 8-bit products beside bfloat16 and the vendor's kernels of the same kind, in one run.

    python benchmarks/gemm.py [--out FOLDER]

Two tables: 1x128 and 128x128 scales, and the other granularities. TFLOP/s of the same product on the same operands; the
error is against the FP32 product of the quantized operands.
"""

from typing import Any

import harness
import torch
from torch.nn import functional

import codegen.torch_ops  # noqa: F401  (registers the operators)
from codegen.product import launch_gemm
from codegen.tiling import GemmProblem, bucket, choose
from qcompiler import numerics

SHAPES = (
    (64, 4096, 7168), (128, 4096, 7168), (128, 7168, 2048), (512, 4096, 4096), (4096, 2048, 7168), (4096, 24576, 1536),
    (4096, 32768, 512), (4096, 7168, 16384), (4096, 4096, 7168), (4096, 7168, 2048), (4096, 4096, 4096),
    (8192, 8192, 8192),
)  # fmt: skip


def measure(m: int, n: int, k: int) -> dict[str, Any]:
    """One row of the table."""
    left = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    e4m3 = torch.float8_e4m3fn
    x, xs = torch.ops.qcompiler.quantize(left, [1, 128], e4m3, "deepseek", "col_major")
    w, ws = torch.ops.qcompiler.quantize(right, [128, 128], e4m3, "deepseek", "row_major")
    want = numerics.scaled_linear(x, xs, w, ws, out_dtype=torch.float32)
    out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    config = choose(GemmProblem(bucket(m), n, k))

    def ours() -> torch.Tensor:
        launch_gemm(config, x, w, out, xs, ws, None)
        return out

    def vendor() -> torch.Tensor:
        kind = functional.ScalingType
        return functional.scaled_mm(
            x, w.T, xs, kind.BlockWise1x128, ws.t(), kind.BlockWise128x128, output_dtype=torch.bfloat16
        )

    work = 2 * m * n * k / 1e9
    error, vendor_error = harness.relative_error(ours(), want), harness.relative_error(vendor(), want)
    del want
    speed = {
        name: work / harness.milliseconds(launch)
        for name, launch in (("bf16", lambda: torch.mm(left, right.T)), ("vendor", vendor), ("ours", ours))
    }
    return {
        "M, N, K": f"{m}, {n}, {k}",
        "bf16 cuBLAS": speed["bf16"],
        "cuBLAS 1x128/128x128": speed["vendor"],
        "qcompiler": speed["ours"],
        "x bf16": speed["ours"] / speed["bf16"],
        "x cuBLAS": speed["ours"] / speed["vendor"],
        "error": error,
        "cuBLAS error": vendor_error,
        "configuration": str(config),
    }


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
    rows = [measure(*shape) for shape in SHAPES]
    title = "FP8 GEMM, 1x128 and 128x128 scales, bfloat16 out: TFLOP/s by warm CUDA-graph replay"
    harness.report("h200-gemm", title, rows, harness.machine())
    rows = [measure_granularities(*shape) for shape in SHAPES]
    title = "8-bit GEMM of other granularities, bfloat16 out: TFLOP/s by warm CUDA-graph replay"
    harness.report("h200-gemm-granularities", title, rows, harness.machine())


if __name__ == "__main__":
    main()
