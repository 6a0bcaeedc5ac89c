"""The resources of each kernel on a multiprocessor, compiled for Hopper without a GPU; printed after the run.

To add a kernel family, add an entry to KERNELS: its name, and how it is compiled. Kernels that other tests compile in
the same way are not compiled again.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import triton
from entry_kernels import compile_group_entries
from gather_kernels import compile_gather_codes
from hopper_kernels import (
    GROUPED_CONFIGS,
    all_configs,
    all_fused_configs,
    compile_amax,
    compile_append,
    compile_attend,
    compile_combine,
    compile_expression,
    compile_fused,
    compile_fused_quantize,
    compile_gemm,
    compile_grouped,
    compile_known,
    compile_next_tokens,
    compile_quantize,
    compile_read,
    compile_row_gemm,
    compile_scale,
    compile_sum_splits,
    compile_tokens,
)
from inbox_kernels import compile_open, compile_sum
from peer_kernels import compile_exchange, compile_exchange_chosen
from pointwise_examples import compile_norm, compile_rotary, compile_rotary_append

from codegen.machine_code import MachineCode
from codegen.targets.hopper import HOPPER
from codegen.templates.fused import FusedGemmConfig
from codegen.templates.gemm import Kind
from codegen.templates.grouped import MOST_GROUPS, GroupedConfig

B16, F32 = torch.bfloat16, torch.float32
NORM = "h = bf16(x0 + x1); n = rsqrt(mean(h * h) + 1e-06); bf16(x2 * bf16(h * n))"
SUM_NORM = "h = bf16(x0 + bf16(y0)); n = rsqrt(mean(h * h) + 1e-06); bf16(x1 * bf16(h * n))"
GATED = "bf16(bf16(silu(x0)) * x1)"
SWIGLU, RESIDUAL = "bf16(bf16(silu(bf16(y0))) * bf16(y1))", "bf16(x0 + bf16(y0))"
ROWS: tuple[Kind, ...] = ("rows_f8", "rows_i8")


def fused(config: FusedGemmConfig) -> MachineCode:
    expression, others = (SWIGLU, ()) if config.parts == 2 else (RESIDUAL, (B16,))
    return compile_fused(config, expression, others=others, bias_dtype=None if config.parts * config.waves > 2 else B16)


def grouped(config: GroupedConfig) -> MachineCode:
    return compile_grouped(config, out_dtype=B16 if config.variant == "wide" else F32, groups=MOST_GROUPS)


KERNELS: dict[str, Callable[[], MachineCode]] = {
    "quantize, tiles of 128": compile_quantize,
    "quantize, rows of 4096": partial(compile_tokens, 4096),
    "quantize, known scale": compile_known,
    "amax of a tensor": compile_amax,
    "scale of a tensor": compile_scale,
    "append to a cache, f8": partial(compile_append, torch.float8_e4m3fn),
    "attend to a cache, bf16": compile_attend,
    "attend to a cache, f8": partial(compile_attend, torch.float8_e4m3fn),
    "attend to a cache, f8, 512 tokens": partial(compile_attend, torch.float8_e4m3fn, batch=1, tokens=512),
    "attend to a latent, bf16": partial(compile_attend, groups=1, repeats=128, sizes=(576, 512), within=True),
    "attend to a latent, f8": partial(
        compile_attend, torch.float8_e4m3fn, groups=1, repeats=128, sizes=(576, 512), within=True
    ),
    "read a cache, f8": partial(compile_read, torch.float8_e4m3fn),
    "largest logits of parts": lambda: compile_next_tokens(16, 128256)[0],
    "next tokens": lambda: compile_next_tokens(16, 128256)[1],
    "sum of 64 splits of a cache": compile_combine,
    "sum of 64 splits of a cache, quantized": partial(compile_combine, tile=128),
    "fused quantize, norm of 4096": partial(compile_fused_quantize, NORM, (B16,) * 3, 4096, vectors=(2,), keep=("h",)),
    "fused quantize, sum of 2 terms and norm of 8192": partial(
        compile_fused_quantize, SUM_NORM, (B16, B16), 8192, vectors=(1,), keep=("h",), terms=2
    ),
    "fused quantize, sum over 8 GPUs and norm of 8192": partial(
        compile_fused_quantize, NORM, (B16,) * 3, 8192, m=64, vectors=(2,), keep=("h",), summed=1, ranks=8
    ),
    "fused quantize, gated": partial(compile_fused_quantize, GATED, (B16, B16), 4096),
    **{f"tiles, {config}": partial(compile_gemm, config) for config in all_configs()},
    "codes of gathered rows": partial(compile_gather_codes, 4096, 8, 2048),
    "few entries, placed": lambda: compile_group_entries(512, 128)[0],
    "entries of each group, counted": lambda: compile_group_entries(32768, 128)[0],
    "entries of each group, placed": lambda: compile_group_entries(32768, 128)[1],
    "sum over 2 GPUs": partial(compile_exchange, 2, (16, 8192), summed=True),
    "gather of 8 GPUs": partial(compile_exchange, 8, (4096, 1024)),
    "chosen tokens of 4 GPUs": partial(compile_exchange_chosen, 4, 4096, 4096),
    "sums of chosen tokens over 8 GPUs": partial(compile_exchange_chosen, 8, 4096, 4096, summed=True),
    "parts of a sum over 4 GPUs": partial(compile_exchange, 4, (4096, 8192), scattered=True, summed=True),
    "opening of the inboxes of 8 GPUs": partial(compile_open, 8),
    "sum of an inbox of 8 GPUs": partial(compile_sum, 8, 512, 8192),
    "sum of 4 splits": partial(compile_sum_splits, 4, bias_dtype=B16),
    "sum of 4 splits, rows": partial(compile_sum_splits, 4, "rows_f8", bias_dtype=B16),
    "rotary embedding": compile_rotary,
    "rotary embedding and append, f8": compile_rotary_append,
    "norm of 4096": compile_norm,
    "expression alone": partial(compile_expression, RESIDUAL),
    **{f"{kind}, {config}": partial(compile_row_gemm, config, kind) for kind in ROWS for config in all_configs(kind)},
    **{f"fused, {config}": partial(fused, config) for config in all_fused_configs()},
    **{f"grouped, {config}": partial(grouped, config) for config in GROUPED_CONFIGS},
}
"""Name -> the code chosen for many rows in bf16."""

SPILLED_BY_3_6 = {"attend to a cache, f8, 512 tokens": 1}
"""Registers that Triton 3.6 spills; later versions spill none."""


def numbers(code: MachineCode) -> tuple[int, ...]:
    """Registers, warps, bytes of shared memory, blocks, tensor core and copy engine instructions, and spills."""
    used = (code.registers, code.warps, code.shared_memory)
    counts = (code.qgmma + code.igmma, code.tma_loads + code.tma_stores, code.local_loads + code.local_stores)
    return (*used, HOPPER.limits.blocks_at_once(*used), *counts)


@pytest.mark.parametrize("name", KERNELS)
def test_budget(name: str, record_property: Callable[[str, object], None]) -> None:
    code = KERNELS[name]()
    spilled = SPILLED_BY_3_6.get(name, 0) if triton.__version__.startswith("3.6.") else 0
    assert max(code.local_loads, code.local_stores) <= spilled, "registers were spilled to local memory"
    blocks = HOPPER.limits.blocks_at_once(code.registers, code.warps, code.shared_memory)
    assert blocks >= 1 and code.shared_memory <= HOPPER.limits.shared_memory, "no multiprocessor can hold a block"
    assert 32 * code.warps * code.registers <= 65536 and 0 < code.registers <= 255
    record_property("budget", [name, *numbers(code)])


def test_blocks_per_multiprocessor() -> None:
    def held(registers: int, shared_memory: int, warps: int) -> int:
        return HOPPER.limits.blocks_at_once(registers, warps, shared_memory)

    assert held(168, 0, 4) == 3  # 168 * 32 * 4 = 21504 of 65536 registers
    assert held(161, 0, 4) == 3 and held(160, 0, 4) == 3 and held(128, 0, 4) == 4
    assert held(16, 75 * 1024, 4) == 3 and held(16, 76 * 1024, 4) == 2  # each block needs 1 KB more
    assert held(16, 0, 4) == 16 and held(16, 0, 1) == 32 and held(255, 227 * 1024, 8) == 1
