"""Fused quantization (norm, gate or residual sum, and codes in one kernel) against the bandwidth of a copy.

    python benchmarks/memory_bound.py [--out FOLDER]

Bytes are the minimum traffic: each operand read once, each code, scale and residual output written once. "Unfused" is
the same work with torch's best operators, including `torch.nn.functional.rms_norm`, followed by `kernel.quantize`.
Small numbers of rows measure latency: they do not fill the device, and operands stay in L2.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import harness
import torch
from torch import Tensor
from torch.nn import functional

import codegen.torch_ops  # noqa: F401  (registers the operators)
from codegen.operators.quantize import SCALE_LAYOUTS

E4M3 = torch.float8_e4m3fn
LAYOUT = SCALE_LAYOUTS[1]


class Work(NamedTuple):
    """A fused expression, which operands are vectors (an FP32 prescale is the last), and the same work in torch.

    `unfused` takes the operands without the prescale; it returns the value to quantize and the residual output.
    """

    expression: str
    operands: int
    vectors: tuple[int, ...]
    unfused: Callable[..., tuple[Tensor, ...]]
    keep: tuple[str, ...] = ()
    prescaled: bool = False


def _norm(x: Tensor, gain: Tensor) -> tuple[Tensor]:
    return (functional.rms_norm(x, gain.shape, gain, 1e-6),)


def _add_norm(x: Tensor, residual: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return functional.rms_norm(h, gain.shape, gain, 1e-6), h


def _layer_norm(x: Tensor, gain: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (functional.layer_norm(x, gain.shape, gain, bias, 1e-5),)


def _gate(gate: Tensor, up: Tensor) -> tuple[Tensor]:
    return (functional.silu(gate) * up,)


WORKS = {
    "quantize": Work("x0", 1, (), lambda x: (x,)),
    "RMSNorm": Work("n = rsqrt(mean(x0 * x0) + 1e-06); bf16(x1 * bf16(x0 * n))", 2, (1,), _norm),
    "add, RMSNorm": Work(
        "h = bf16(x0 + x1); n = rsqrt(mean(h * h) + 1e-06); bf16(x2 * bf16(h * n))", 3, (2,), _add_norm, ("h",)
    ),
    "LayerNorm": Work("bf16(standardize(x0, 1e-05) * x1 + x2)", 3, (1, 2), _layer_norm),
    "silu, mul": Work("bf16(bf16(silu(x0)) * x1)", 2, (), _gate),
    "gelu": Work("bf16(gelu(x0))", 1, (), lambda x: (functional.gelu(x),)),
    "gelu tanh": Work("bf16(gelu_tanh(x0))", 1, (), lambda x: (functional.gelu(x, approximate="tanh"),)),
}
NORMS = ("RMSNorm", "add, RMSNorm", "LayerNorm")
LARGE = [(name, 8192, k) for k in (4096, 5120, 7168, 8192) for name in NORMS]
LARGE += [("silu, mul", 4096, k) for k in (14336, 11008)]
LARGE += [(name, 8192, 8192) for name in ("quantize", "gelu", "gelu tanh")]
SMALL = [(name, m, 4096) for name in (*NORMS, "silu, mul") for m in (1, 16, 64)]


def prescaled(work: Work) -> Work:
    """The same work with an unrounded prescale for each channel."""
    *definitions, result = work.expression.split("; ")
    expression = "; ".join([*definitions, f"{result} * x{work.operands}"])
    return work._replace(
        expression=expression, operands=work.operands + 1, vectors=(*work.vectors, work.operands), prescaled=True
    )


def operands_of(work: Work, m: int, k: int, sliced: bool) -> list[Tensor]:
    """Random operands; if `sliced`, two matrices are the halves of one."""
    made = []
    for place in range(work.operands):
        dtype = torch.float32 if work.prescaled and place == work.operands - 1 else torch.bfloat16
        made.append(torch.randn((k,) if place in work.vectors else (m, k), device="cuda", dtype=dtype))
    if sliced:
        made[:2] = torch.randn(m, 2 * k, device="cuda", dtype=torch.bfloat16).chunk(2, -1)
    return made


def measure(
    name: str, m: int, k: int, copy: float, *, prescale: bool = False, sliced: bool = False,
    block: Sequence[int] = (1, 128), dtype: torch.dtype = E4M3,
) -> dict[str, Any]:  # fmt: skip
    """One row of the table."""
    work = prescaled(WORKS[name]) if prescale else WORKS[name]
    operands = operands_of(work, m, k, sliced)
    factors = operands[-1] if prescale else None
    layout = LAYOUT if block[1] > 0 else "row_major"

    def fused() -> list[Tensor]:
        return torch.ops.qcompiler.fused_quantize(
            operands, work.expression, work.keep, block, dtype, "deepseek", layout
        )

    def unfused() -> tuple[Tensor, Tensor]:
        result = work.unfused(*operands[: len(operands) - prescale])[0]
        return torch.ops.qcompiler.quantize(result, block, dtype, "deepseek", layout, factors)

    work_name = name + (", prescale" if prescale else "") + (", slices" if sliced else "")
    return row(work_name, (m, k), block, dtype, operands, fused, unfused, copy)


def measure_terms(count: int, m: int, k: int, copy: float) -> dict[str, Any]:
    """One row: a sum of FP8 terms before a residual sum and a norm; "unfused" stores the sum of the terms in bf16."""
    work, block = WORKS["add, RMSNorm"], (1, 128)
    x, gain = torch.randn(m, k, device="cuda").bfloat16(), torch.randn(k, device="cuda").bfloat16()
    terms = torch.randn(count * m, k, device="cuda").bfloat16()
    quantized = torch.ops.qcompiler.quantize(terms, block, E4M3, "deepseek", "row_major")
    codes, scales = (each.view(count, m, -1) for each in quantized)
    text = " + ".join(f"x0[{term}, i0, i1] * x1[{term}, i0, floordiv(i1, 128)]" for term in range(count))
    rest = (work.keep, block, E4M3, "deepseek", LAYOUT)

    def fused() -> list[Tensor]:
        expression = work.expression.replace("x1", "bf16(y0)").replace("x2", "x1")
        return torch.ops.qcompiler.fused_sum_quantize(codes, scales, [x, gain], expression, work.keep, block, *rest[1:])

    def unfused() -> list[Tensor]:
        (total,) = torch.ops.qcompiler.pointwise([codes, scales], [f"bf16({text})"], [f"x0.1, {k}"])
        return torch.ops.qcompiler.fused_quantize([x, total, gain], work.expression, *rest)

    operands = (codes, scales, x, gain)
    return row(f"sum of {count} terms, add, RMSNorm", (m, k), block, E4M3, operands, fused, unfused, copy)


def row(
    name: str, sizes: tuple[int, int], block: Sequence[int], dtype: torch.dtype, operands: Sequence[Tensor],
    fused: Callable[[], list[Tensor]], unfused: Callable[[], object], copy: float,
) -> dict[str, Any]:  # fmt: skip
    """Times both functions; `fused` reads the operands once."""
    made = fused()
    time, before = harness.milliseconds(fused), harness.milliseconds(unfused)
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*operands, *made))
    return {
        "work": name,
        "M, K": "{}, {}".format(*sizes),
        "block": str(list(block)),
        "format": str(dtype).removeprefix("torch."),
        "us": time * 1e3,
        "GB/s": size / time / 1e6,
        "of copy": size / time / 1e6 / copy,
        "unfused us": before * 1e3,
        "times faster": before / time,
    }


def copy_bandwidth() -> float:
    """GB/s, read plus written, of a copy of 128 MB; the best of three."""
    source = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return max(2 * source.nbytes / harness.milliseconds(lambda: target.copy_(source)) / 1e6 for _ in range(3))


def main() -> None:
    harness.arguments()
    torch.manual_seed(0)
    copy = copy_bandwidth()
    rows = [measure(*each, copy) for each in LARGE]
    rows += [measure("silu, mul", 4096, 14336, copy, sliced=True)]
    rows += [measure(*each, copy, prescale=True) for each in LARGE if each[2] in (4096, 8192, 14336)]
    rows += [measure(name, 8192, 4096, copy, block=(1, -1), dtype=torch.int8) for name in ("quantize", *NORMS)]
    rows += [measure(*each, copy) for each in SMALL]
    rows += [measure_terms(count, m, 8192, copy) for count, m in ((2, 2048), (4, 1024), (8, 512), (2, 16))]
    title = f"Fused quantization: GB/s by warm CUDA-graph replay; a copy moves {copy:.0f} GB/s"
    harness.gpu_report("memory-bound", title, rows)


if __name__ == "__main__":
    main()
