"""GEMMs with a fused expression, compiled for Hopper without a GPU: required properties of the machine code."""

import re

import pytest
import torch
from hopper_kernels import all_fused_configs, compile_expression, compile_fused

from codegen.targets.hopper import HOPPER
from codegen.templates.fused import FusedGemmConfig

E4M3 = torch.float8_e4m3fn
SWIGLU = "bf16(bf16(silu(bf16(y0))) * bf16(y1))"
GEGLU = "bf16(bf16(gelu_tanh(bf16(y0))) * bf16(y1))"
RESIDUAL = "bf16(x0 + bf16(y0))"
SCALED = "f16(x0 + f16(f16(y0) * x1))"
SUMS = {1: ("bf16(gelu(y0))", torch.float32), 2: ("silu(y0) * y1", torch.float32)}
FORMS = all_fused_configs()


def one_of(parts: int, waves: int) -> FusedGemmConfig:
    return next(config for config in FORMS if (config.parts, config.waves) == (parts, waves))


@pytest.mark.parametrize("config", FORMS, ids=str)
def test_every_form(config: FusedGemmConfig) -> None:
    expression = SWIGLU if config.parts == 2 else RESIDUAL
    others = () if config.parts == 2 else (torch.bfloat16,)
    for out_dtype in (None, E4M3):
        bias = None if config.parts == 2 else torch.bfloat16
        code = compile_fused(config, expression, others=others, bias_dtype=bias, out_dtype=out_dtype)
        assert (code.local_loads, code.local_stores) == (0, 0), "registers were spilled to local memory"
        # One step is four instructions of K = 32 into fresh registers; each consumer has its own code.
        assert code.qgmma == 4 * 2 * config.waves and "QGMMA.64x128x32.F32.E4M3.E4M3" in code.sass
        # The first stages of the weight are loaded by instructions of their own, in small tiles.
        early = config.parts if config.parts * config.rows < 256 else 0
        assert (code.tma_loads, code.tma_stores) == (2 + config.parts + early, 0)
        assert code.shared_memory <= config.shared_memory() <= HOPPER.limits.shared_memory
        assert code.wide_stores == (1 if out_dtype else 2), "codes and results must be stored 16 bytes at a time"
        shares = {int(text, 16) for text in re.findall(r"USETMAXREG\.DEALLOC\.CTAPOOL (0x[0-9a-f]+)", code.sass)}
        assert {208, 72, 24} <= shares
        turns = len(re.findall(r"BAR\.ARV 0x[89], 0x100 ", code.sass))
        assert turns == (5 if config.waves == 2 else 0)


@pytest.mark.parametrize(
    ("parts", "expression", "others", "out_dtype", "layout", "profile"),
    [
        (2, GEGLU, (), E4M3, "row_major", "deepgemm"),
        (2, SWIGLU, (), torch.float8_e5m2, "col_major", "ue8m0"),
        (1, SCALED, (torch.float16, torch.float32), torch.int8, "row_major", "vllm"),
        (1, "bf16(gelu(bf16(y0)))", (), E4M3, "col_major", "deepseek"),
    ],
)
def test_bodies_formats_and_layouts(
    parts: int,
    expression: str,
    others: tuple[torch.dtype, ...],
    out_dtype: torch.dtype | None,
    layout: str,
    profile: str,
) -> None:
    code = compile_fused(
        one_of(parts, 2),
        expression,
        others=others,
        out_dtype=out_dtype,
        scale_layout=layout,
        profile=profile,
        columns=4096,
    )
    assert (code.local_loads, code.local_stores) == (0, 0)
    assert code.qgmma == 16 and code.tma_loads == 2 + parts


@pytest.mark.parametrize("parts", [1, 2])
def test_fp32_sums_and_ragged_columns(parts: int) -> None:
    expression, _ = SUMS[parts]
    config = one_of(parts, 1)
    code = compile_fused(config, expression, out_dtype=E4M3, columns=4096 if parts == 2 else 4112)
    assert (code.local_loads, code.local_stores) == (0, 0)
    assert code.shared_memory <= config.shared_memory(4)


def test_multiply_adds_are_where_they_are_written() -> None:
    """The expression rounds a product and then a sum, like separate operations; each promotion is one multiply-add."""
    config = one_of(1, 1)
    expressions = (RESIDUAL, "bf16(x0 * bf16(y0) + x0)")
    compiled = [
        compile_fused(config, expression, others=(torch.bfloat16,), bias_dtype=torch.bfloat16)
        for expression in expressions
    ]
    counts = [len(re.findall(r"\bFFMA\b", code.sass)) for code in compiled]
    assert counts == [2 * 64, 2 * 64]


@pytest.mark.parametrize("expression", ["bf16(silu(y0) * y1)", "bf16(x0 + y0)", "f16(gelu(y0) * x1 + x0)"])
def test_an_expression_alone_uses_wide_loads_and_stores(expression: str) -> None:
    code = compile_expression(expression)
    assert code.wide_loads >= 2 and code.wide_stores == 2
    assert (code.local_loads, code.local_stores) == (0, 0)
