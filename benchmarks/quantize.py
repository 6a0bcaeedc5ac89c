"""Quantization at every granularity against the bandwidth of a copy on the same device, in one run.

    python benchmarks/quantize.py [--out FOLDER]

Bytes are the minimum traffic: each element read once, each code and each scale written once. A dynamic per-tensor scale
must be known before the first code, so each element is read twice there.
"""

from typing import Any

import harness
import torch

from codegen.operators.quantize import SCALE_LAYOUTS

E4M3, I8 = torch.float8_e4m3fn, torch.int8
TILE, TOKEN, TENSOR = (1, 128), (1, -1), (-1, -1)
SHAPES = ((8192, 8192), (8192, 7168), (4096, 4096), (128, 7168))


def copy_bandwidth() -> float:
    """GB/s, read plus written, of a copy of 128 MB, as large as the largest input below; the best of three."""
    source = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return max(2 * source.nbytes / harness.milliseconds(lambda: target.copy_(source)) / 1e6 for _ in range(3))


def measure(
    m: int, k: int, copy: float, *, block: tuple[int, int] = TILE, dtype: torch.dtype = E4M3, layout: str = "row_major",
    profile: str = "deepseek", static: bool = False, prescaled: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One row of the table."""
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    prescale = torch.rand(k, device="cuda").add(0.5) if prescaled else None
    q, scale = torch.ops.qcompiler.quantize(x, block, dtype, profile, layout, prescale)

    def launch() -> object:
        if static:
            return torch.ops.qcompiler.quantize_static(x, scale, block, dtype, profile, prescale)
        return torch.ops.qcompiler.quantize(x, block, dtype, profile, layout, prescale)

    time = harness.milliseconds(launch)
    reads = 2 if block == TENSOR and not static else 1
    speed = (reads * x.nbytes + q.nbytes + scale.numel() * 4) / time / 1e6
    return {
        "M, K": f"{m}, {k}",
        "block": str(list(block)),
        "format": str(dtype).removeprefix("torch."),
        "scale": "static" if static else "dynamic",
        "prescale": "yes" if prescaled else "no",
        "layout": layout,
        "profile": profile,
        "us": time * 1e3,
        "GB/s": speed,
        "copy GB/s": copy,
        "of copy": speed / copy,
    }


def main() -> None:
    harness.arguments()
    torch.manual_seed(0)
    copy = copy_bandwidth()
    rows = [measure(m, k, copy, layout=layout) for m, k in SHAPES for layout in SCALE_LAYOUTS]
    rows += [measure(8192, 8192, copy, layout="col_major", profile=profile) for profile in ("deepgemm", "ue8m0")]
    rows.append(measure(8192, 8192, copy, dtype=I8, layout="col_major"))
    for dtype in (E4M3, I8):
        rows += [measure(m, k, copy, block=TOKEN, dtype=dtype) for m, k in SHAPES]
        rows += [measure(m, k, copy, block=TENSOR, dtype=dtype) for m, k in SHAPES]
        rows += [measure(m, k, copy, block=TENSOR, dtype=dtype, static=True) for m, k in SHAPES]
        rows += [measure(8192, 8192, copy, block=TOKEN, dtype=dtype, prescaled=True)]
        rows += [measure(8192, 8192, copy, block=TENSOR, dtype=dtype, static=True, prescaled=True)]
    title = "Quantization of bfloat16: GB/s by warm CUDA-graph replay; (128, 7168) stays in L2"
    harness.gpu_report("quantize", title, rows)


if __name__ == "__main__":
    main()
