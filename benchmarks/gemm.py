"""8-bit GEMMs compared with bfloat16 and with the vendor's 8-bit kernels, in one run.

    python benchmarks/gemm.py [--out FOLDER]

Two tables: 1x128 and 128x128 scales, and the other granularities. All columns are TFLOP/s of the same GEMM on the same
operands; the error is relative to the FP32 matmul of the quantized operands. In the first table the kernels of a row
alternate because, at its power limit, the device clocks higher for the kernel that runs first. Small M is also measured
with weights from memory ("cold"), by rotating through enough weights that none stays in the cache.
"""

import importlib
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch.nn import functional

import codegen.torch_ops  # noqa: F401  (registers the operators)
from codegen.launching.timing import in_turns
from codegen.targets.hopper import HOPPER
from codegen.templates.gemm import GEMM, GemmOperands, GemmProblem, bucket
from qcompiler import numerics

SHAPES = (
    (64, 4096, 7168), (128, 4096, 7168), (128, 7168, 2048), (512, 4096, 4096), (4096, 2048, 7168), (4096, 24576, 1536),
    (4096, 32768, 512), (4096, 7168, 16384), (4096, 4096, 7168), (4096, 7168, 2048), (4096, 4096, 4096),
    (8192, 8192, 8192),
)  # fmt: skip
"""Shapes commonly used to compare FP8 kernels."""

LAYERS = (
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336),
    (10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672),
    (2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048),
)  # fmt: skip
"""N and K of Llama-3-8B and Llama-3-70B (q, k and v; output; gate and up; down), and of DeepSeek-V3 (the projections of
its attention, one expert)."""

ROWS = (1, 16, 64, 128, 1024, 4096, 8192)
MODEL_SHAPES = tuple(shape for m in ROWS for n, k in LAYERS if (shape := (m, n, k)) not in SHAPES)

deep_gemm = importlib.import_module("deep_gemm") if importlib.util.find_spec("deep_gemm") else None

FEW_ROWS, COLD_BYTES = 128, 160_000_000
"""The largest M at which loading weights dominates, and a number of bytes of weights that exceeds the cache."""


def measure(m: int, n: int, k: int) -> dict[str, Any]:
    """One row of the table."""
    first = _Operands(m, n, k)
    want = numerics.scaled_linear(first.x, first.xs, first.w, first.ws, out_dtype=torch.float32)
    errors = {name: _error(launch, want) for name, launch in first.launches().items()}
    del want
    warm = in_turns({name: [launch] for name, launch in first.launches().items() if errors[name] is not None})
    work = 2 * m * n * k / 1e6
    row = {"M, N, K": f"{m}, {n}, {k}"} | {
        name: work / warm[name] if name in warm else None for name in first.launches()
    }
    cold: dict[str, float] = {}
    if m <= FEW_ROWS:
        others = [first] + [_Operands(m, n, k) for _ in range(COLD_BYTES // (n * k))]
        cold = in_turns({name: [each.launches()[name] for each in others] for name in BLOCKS if name in warm})
    better = min((warm[name] for name in (VENDOR, DEEPGEMM) if name in warm), default=None)
    better_cold = min((cold[name] for name in (VENDOR, DEEPGEMM) if name in cold), default=None)
    return row | {
        "x bf16": warm["bf16 cuBLAS"] / warm[OURS],
        "x cuBLAS": warm[VENDOR] / warm[OURS] if VENDOR in warm else None,
        "x the better": better / warm[OURS] if better else None,
        "cold us, cuBLAS": cold.get(VENDOR),
        "cold us, ours": cold[OURS] if cold else None,
        "cold, x the better": better_cold / cold[OURS] if better_cold else None,
        "TB/s of weights": n * k / cold[OURS] / 1e6 if cold else None,
        "error": errors[OURS],
        "cuBLAS error": errors[VENDOR],
        "configuration": str(first.config),
    }


def _error(launch: Callable[[], torch.Tensor], want: torch.Tensor) -> float | None:
    """The error of one launch, or None if the vendor has no kernel for the sizes."""
    try:
        return harness.relative_error(launch(), want)
    except (RuntimeError, ValueError):
        return None


OURS, VENDOR, DEEPGEMM = "qcompiler", "cuBLAS 1x128/128x128", "DeepGEMM"
BLOCKS = (OURS, VENDOR, DEEPGEMM)
"""The kernels that compute exactly the same GEMM."""


class _Operands:
    """One GEMM, and a launch of each kernel."""

    def __init__(self, m: int, n: int, k: int) -> None:
        e4m3 = torch.float8_e4m3fn
        self.left = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        self.right = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        self.x, self.xs = torch.ops.qcompiler.quantize(self.left, [1, 128], e4m3, "deepseek", "col_major")
        self.w, self.ws = torch.ops.qcompiler.quantize(self.right, [128, 128], e4m3, "deepseek", "row_major")
        self.one = torch.ones((), device="cuda")
        self.out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
        self.config = GEMM.family(HOPPER).choose(GemmProblem(bucket(m), n, k))

    def launches(self) -> dict[str, Callable[[], torch.Tensor]]:
        """The compared kernels by name."""
        named = {
            "bf16 cuBLAS": self.bf16, "cuBLAS FP8 per tensor": self.vendor_tensor, VENDOR: self.vendor, OURS: self.ours,
        }  # fmt: skip
        return named if deep_gemm is None else named | {DEEPGEMM: self.deepgemm}

    def bf16(self) -> torch.Tensor:
        return torch.mm(self.left, self.right.T)

    def ours(self) -> torch.Tensor:
        GEMM.family(HOPPER).launch(self.config, GemmOperands(self.x, self.w, self.out, self.xs, self.ws))
        return self.out

    def vendor(self) -> torch.Tensor:
        kind = functional.ScalingType
        return functional.scaled_mm(
            self.x, self.w.T, self.xs, kind.BlockWise1x128, self.ws.t(), kind.BlockWise128x128,
            output_dtype=torch.bfloat16,
        )  # fmt: skip

    def vendor_tensor(self) -> torch.Tensor:
        """A different GEMM on the same codes: one scale per operand, and fast accumulation."""
        return torch._scaled_mm(self.x, self.w.T, self.one, self.one, out_dtype=torch.bfloat16, use_fast_accum=True)

    def deepgemm(self) -> torch.Tensor:
        deep_gemm.fp8_gemm_nt((self.x, self.xs), (self.w, self.ws), self.out, disable_ue8m0_cast=True)
        return self.out


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
    """One row of the second table: the operators as a compiled model calls them, and the largest of their errors."""
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
        want = numerics.scaled_linear(
            x,
            xs,
            w,
            ws,
            x_format=numerics.format_of(x_block, x.dtype),
            w_format=numerics.format_of(w_block, w.dtype),
            out_dtype=torch.float32,
        )
        worst = max(worst, harness.relative_error(torch.ops.qcompiler.scaled_linear(*arguments), want))
        del want
        row[name] = work / harness.milliseconds(lambda given=arguments: torch.ops.qcompiler.scaled_linear(*given))
        if name == "FP8 token x channel":
            row["cuBLAS FP8 token x channel"] = work / harness.milliseconds(
                lambda x=x, w=w, xs=xs, ws=ws: torch._scaled_mm(x, w.T, xs, ws.T, out_dtype=torch.bfloat16)
            )
        if name == "FP8 tensor x tensor":
            row["cuBLAS FP8 tensor x tensor"] = work / harness.milliseconds(
                lambda x=x, w=w, xs=xs, ws=ws: torch._scaled_mm(
                    x, w.T, xs.view(()), ws.view(()), out_dtype=torch.bfloat16
                )
            )
        if name == "INT8 token x channel":
            row["cuBLAS INT8, int32 out"] = work / harness.milliseconds(lambda x=x, w=w: torch._int_mm(x, w.T))
    return row | {"worst error": worst}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means over the shapes, with minimum and maximum."""
    many = [row for row in rows if int(row["M, N, K"].split(",")[0]) >= 1024]
    few = [row for row in rows if int(row["M, N, K"].split(",")[0]) <= FEW_ROWS]
    chosen = (
        ("M >= 1024, x cuBLAS 1x128/128x128", many, "x cuBLAS"),
        ("M >= 1024, x bf16", many, "x bf16"),
        ("M <= 128, warm, x the better of cuBLAS and DeepGEMM", few, "x the better"),
        ("M <= 128, cold, x the better of cuBLAS and DeepGEMM", few, "cold, x the better"),
        ("M <= 128, warm, x bf16", few, "x bf16"),
    )
    lines = []
    for title, among, column in chosen:
        ratios = [row[column] for row in among if row[column] is not None]
        lines += [_line(title, ratios)] if ratios else []
    return lines


def _line(title: str, ratios: list[float]) -> dict[str, Any]:
    mean = statistics.geometric_mean(ratios)
    return {"": title, "mean": mean, "worst": min(ratios), "best": max(ratios), "shapes": len(ratios)}


def main() -> None:
    harness.arguments()
    torch.manual_seed(0)
    rows = [measure(*shape) for shape in (*SHAPES, *MODEL_SHAPES)]
    title = "FP8 GEMM, 1x128 and 128x128 scales, bfloat16 out: TFLOP/s by warm CUDA-graph replay, interleaved"
    harness.gpu_report("gemm", title, rows)
    harness.gpu_report("gemm-summary", "FP8 GEMM: geometric means of ratios", summary(rows))
    rows = [measure_granularities(*shape) for shape in SHAPES]
    title = "8-bit GEMM of other granularities, bfloat16 out: TFLOP/s by warm CUDA-graph replay"
    harness.gpu_report("gemm-granularities", title, rows)
    pairs = (("FP8 token x channel",) * 2, ("FP8 tensor x tensor",) * 2, ("INT8 token x channel", "INT8, int32 out"))
    many = [row for row in rows if int(row["M, N, K"].split(",")[0]) >= 1024]
    lines = [
        _line(f"{ours}, M >= 1024, x cuBLAS", [row[ours] / row[f"cuBLAS {its}"] for row in many]) for ours, its in pairs
    ]
    harness.gpu_report("gemm-granularities-summary", "Geometric means of ratios", lines)


if __name__ == "__main__":
    main()
