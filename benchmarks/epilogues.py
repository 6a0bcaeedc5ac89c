"""GEMMs with a fused expression: one kernel, two kernels, and torch, in one run.

    python benchmarks/epilogues.py [--out FOLDER]

Times are microseconds per CUDA-graph replay. The launches of a row alternate because, at its power limit, the device
clocks higher for the kernel that runs first. "Cold" rotates through enough operands that no weight stays in the cache.
"One kernel" is the faster form of the fused kernel, even where the operator would choose two kernels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import harness
import torch
from torch import Tensor
from torch.nn import functional

from codegen.epilogues import handed_over
from codegen.launching.timing import in_turns
from codegen.operators import fused_linear as fused_product
from codegen.operators.quantize import quantize_on_gpu, scale_like
from codegen.targets.hopper import HOPPER
from codegen.templates.fused import FUSED_GEMM, FusedGemmConfig, FusedGemmProblem, FusedOperands, Separate
from codegen.templates.gemm import GemmOperands, bucket
from qcompiler import numerics

E4M3 = torch.float8_e4m3fn
QUANTIZED = ((1, 128), E4M3, numerics.DEFAULT_PROFILE, "col_major")
COLD_BYTES = 160_000_000


class Case(NamedTuple):
    """A fused expression, the parts of its weight, the shapes of its other operands, and whether it quantizes."""

    expression: str
    parts: int
    others: int
    quantized: bool


CASES = {
    "SwiGLU, quantize": Case("bf16(bf16(silu(bf16(y0))) * bf16(y1))", 2, 0, True),
    "GELU, quantize": Case("bf16(gelu(bf16(y0)))", 1, 0, True),
    "GELU": Case("bf16(gelu(bf16(y0)))", 1, 0, False),
    "residual": Case("bf16(x0 + bf16(y0))", 1, 1, False),
}

ROWS = (128, 256, 512, 1024, 2048, 4096, 8192)
# Llama-3-8B and -70B, DeepSeek-V3 (an expert and a dense layer); GPT-3 6.7B's first linear; output projections.
LAYERS = {
    "SwiGLU, quantize": ((14336, 4096), (28672, 8192), (2048, 7168), (18432, 7168)),
    "GELU, quantize": ((16384, 4096),),
    "GELU": ((16384, 4096),),
    "residual": ((4096, 4096), (8192, 8192)),
}


class _Operands:
    """One GEMM with a fused expression, and each way to compute it."""

    def __init__(self, case: Case, m: int, n: int, k: int) -> None:
        self.case = case
        draw: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        self.x, self.xs = quantize_on_gpu(torch.randn(m, k, **draw), *QUANTIZED, None)
        weight = torch.randn(n * case.parts, k, **draw) / k**0.5
        self.w, self.ws = quantize_on_gpu(weight, (128, 128), *QUANTIZED[1:3], "row_major", None)
        self.others = [torch.randn(m, n, **draw) for _ in range(case.others)]
        self.out = torch.empty(m, n, device="cuda", dtype=E4M3 if case.quantized else torch.bfloat16)
        self.scale = scale_like(self.out, 128, "col_major") if case.quantized else None

    def fused(self, config: FusedGemmConfig) -> None:
        product = GemmOperands(self.x, self.w, self.out, self.xs, self.ws)
        FUSED_GEMM.family(HOPPER).launch(config, FusedOperands(self.case.expression, product, self.others, self.scale))

    def separate(self) -> list[Tensor]:
        operands = (self.x, self.xs, self.w, self.ws, None, self.others)
        blocks = ((1, 128), (128, 128))
        quantized = QUANTIZED if self.case.quantized else ()
        given = fused_product.FusedLinear(*operands, self.case.expression, self.case.parts, *blocks, *quantized)
        return fused_product.separate(given)

    def torch(self) -> Any:
        """A GEMM for each part, followed by torch's operators."""
        kind = functional.ScalingType
        weights = zip(self.w.chunk(self.case.parts), self.ws.chunk(self.case.parts), strict=True)
        sums = [
            functional.scaled_mm(
                self.x, w.T, self.xs, kind.BlockWise1x128, ws.t(), kind.BlockWise128x128, output_dtype=torch.bfloat16
            )
            for w, ws in weights
        ]
        if self.case.others:
            result = self.others[0] + sums[0]
        else:
            result = functional.silu(sums[0]) * sums[1] if self.case.parts == 2 else functional.gelu(sums[0])
        return numerics.quantize(result, numerics.format_of((1, 128), E4M3)) if self.case.quantized else result


def measure(name: str, m: int, n: int, k: int) -> dict[str, Any]:
    """One row of the table."""
    case = CASES[name]
    block = (1, 128) if case.quantized else None
    handed = handed_over(case.expression)[0].itemsize
    problem = FusedGemmProblem(bucket(m), n, k, case.parts, handed, 2, case.others, block=block)
    family = FUSED_GEMM.family(HOPPER)
    forms = (config for config in family.configs(problem) if isinstance(config, FusedGemmConfig))
    possible = [config for config in forms if family.why_not(config, problem) is None]
    count = COLD_BYTES // (n * case.parts * k)
    sets = [_Operands(case, m, n, k) for _ in range(1 + count)]
    warm: dict[str, list[Callable[[], object]]] = {"separate": [sets[0].separate], "torch": [sets[0].torch]}
    warm |= {str(config): [partial(sets[0].fused, config)] for config in possible}
    times = in_turns(warm)
    measured = {str(config): times[str(config)] for config in possible}
    best = min(possible, key=lambda config: measured[str(config)])
    cold = dict(times)
    if count:
        cold = in_turns(
            {"separate": [each.separate for each in sets], "one": [partial(each.fused, best) for each in sets]}
        )
    cold.setdefault("one", measured[str(best)])
    chosen = family.choose(problem)
    taken = times["separate"] if isinstance(chosen, Separate) else measured[str(chosen)]
    return {
        "expression": name,
        "M, N, K": f"{m}, {n}, {k}",
        "torch": times["torch"],
        "two kernels": times["separate"],
        "one kernel": measured[str(best)],
        "two / one": times["separate"] / measured[str(best)],
        "cold: two / one": cold["separate"] / cold["one"],
        "torch / chosen": times["torch"] / taken,
        "best / chosen": min(times["separate"], measured[str(best)]) / taken,
        "chosen": "two" if isinstance(chosen, Separate) else str(chosen),
        "estimates": " ".join(f"{family.time(config, problem):.0f}" for config in (Separate(), *possible)),
        "forms": " ".join(f"{form:.1f}" for form in measured.values()),
    }


def main() -> None:
    """Measures all rows and writes the table."""
    harness.arguments()
    torch.manual_seed(0)
    rows = []
    for name, layers in LAYERS.items():
        for n, k in layers:
            for m in ROWS:
                rows.append(measure(name, m, n, k))
                print(*rows[-1].values(), sep=" | ", flush=True)
    title = (
        "GEMMs with a fused expression, FP8 [1, 128], [128, 128]: microseconds by warm CUDA-graph replay, interleaved"
    )
    harness.gpu_report("epilogues", title, rows)


if __name__ == "__main__":
    main()
