"""1x128 quantization against the bandwidth of a copy on the same device, in one run.

    python benchmarks/quantize.py [--out FOLDER]

Bytes are those that have to move: each element read once, each code and each scale written once.
"""

from typing import Any

import harness
import torch

from codegen import torch_ops

SHAPES = ((8192, 8192), (8192, 7168), (4096, 4096), (128, 7168))


def copy_bandwidth() -> float:
    """GB/s, read plus written, of a copy of 128 MB, as large as the largest input below; the best of three."""
    source = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return max(2 * source.nbytes / harness.milliseconds(lambda: target.copy_(source)) / 1e6 for _ in range(3))


def measure(m: int, k: int, layout: str, profile: str, copy: float) -> dict[str, Any]:
    """One row of the table."""
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)

    def launch() -> tuple[torch.Tensor, torch.Tensor]:
        result: tuple[torch.Tensor, torch.Tensor] = torch.ops.qcompiler.quantize(
            x, [1, 128], torch.float8_e4m3fn, profile, layout
        )
        return result

    q, scale = launch()
    time = harness.milliseconds(launch)
    speed = (x.nbytes + q.nbytes + scale.numel() * 4) / time / 1e6
    return {
        "M, K": f"{m}, {k}",
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
    rows = [measure(m, k, layout, "deepseek", copy) for m, k in SHAPES for layout in torch_ops.SCALE_LAYOUTS]
    rows += [measure(8192, 8192, "col_major", profile, copy) for profile in ("deepgemm", "ue8m0")]
    title = "1x128 quantization of bfloat16 to e4m3: GB/s by warm CUDA-graph replay; (128, 7168) stays in L2"
    harness.report("h200-quantize", title, rows, harness.machine())


if __name__ == "__main__":
    main()
