"""Kernels that overlap wait for the ones before them, and start the next one only if they cannot write its weight."""

import ctypes
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hopper_kernels import (
    GROUPED_CONFIGS,
    all_configs,
    all_fused_configs,
    compile_append,
    compile_attend,
    compile_combine,
    compile_fused,
    compile_fused_quantize,
    compile_gemm,
    compile_grouped,
    compile_quantize,
    compile_row_gemm,
    compile_sum_splits,
    compile_tokens,
    quantize_calls,
)

from codegen.driver import driver_version
from codegen.machine_code import MachineCode
from codegen.targets.hopper import HOPPER
from codegen.templates.quantize import QUANTIZE, QuantizeOperands, QuantizeProblem

E4M3, B16 = torch.float8_e4m3fn, torch.bfloat16
WAIT, START = "ACQBULK", "PREEXIT"
SUM = "bf16(y0 + x0)"


def waits(code: MachineCode) -> bool:
    return WAIT in code.sass


def starts(code: MachineCode) -> bool:
    return START in code.sass


def gemm(variant: str, kind: str = "tiles") -> MachineCode:
    config = next(each for each in all_configs(kind) if each.variant == variant)  # type: ignore[arg-type]
    return compile_gemm(config) if kind == "tiles" else compile_row_gemm(config, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "compiled",
    [
        pytest.param(lambda: gemm("narrow"), id="narrow"),
        pytest.param(lambda: gemm("warp"), id="warp"),
        pytest.param(lambda: gemm("split"), id="split"),
        pytest.param(lambda: gemm("narrow", "rows_f8"), id="narrow rows"),
        pytest.param(lambda: gemm("warp", "rows_f8"), id="warp rows"),
        pytest.param(lambda: compile_sum_splits(4), id="sum of splits"),
        pytest.param(lambda: compile_sum_splits(4, "rows_f8"), id="sum of splits of rows"),
        pytest.param(lambda: compile_fused(all_fused_configs()[1], SUM, others=(B16,)), id="fused"),
        pytest.param(lambda: compile_grouped(GROUPED_CONFIGS[0]), id="grouped"),
        pytest.param(lambda: compile_quantize(), id="quantize tiles"),
        pytest.param(lambda: compile_fused_quantize("bf16(x0 + x1)", (B16, B16), 4096, m=16), id="fused quantize"),
        pytest.param(lambda: compile_append(E4M3), id="append"),
        pytest.param(lambda: compile_attend(E4M3), id="attend"),
        pytest.param(
            lambda: compile_attend(E4M3, groups=1, repeats=128, sizes=(576, 512), within=True), id="attend to a latent"
        ),
        pytest.param(lambda: compile_combine(), id="combine"),
        pytest.param(lambda: compile_attend(E4M3, batch=64, tile=128), id="attend and quantize"),
        pytest.param(lambda: compile_combine(tile=128), id="combine and quantize"),
    ],
)
def test_a_kernel_waits_for_earlier_ones_and_lets_the_next_one_start(compiled: Callable[[], MachineCode]) -> None:
    code = compiled()
    assert waits(code) and starts(code)


@pytest.mark.parametrize(
    "compiled",
    [
        pytest.param(lambda: compile_tokens(4096), id="quantize tokens"),
        pytest.param(
            lambda: compile_fused_quantize("bf16(x0 + x1)", (B16, B16), 4096, block_k=-1), id="fused quantize"
        ),
    ],
)
def test_a_kernel_that_may_write_a_weight_does_not_let_the_next_one_start(compiled: Callable[[], MachineCode]) -> None:
    code = compiled()
    assert waits(code) and not starts(code)


def test_weights_are_loaded_before_the_wait() -> None:
    """The first load through the copy engine comes earlier in the machine code than the wait."""
    for code in (gemm("narrow"), gemm("narrow", "rows_f8")):
        assert code.sass.index("UTMALDG") < code.sass.index(WAIT)


def test_the_scale_of_a_weight_is_loaded_before_the_wait() -> None:
    before, _, _ = gemm("narrow").sass.partition(WAIT)
    assert len(re.findall(r"LDG\.E ", before)) == 1


def test_gains_of_a_norm_are_moved_to_l2_before_the_wait() -> None:
    norm = "bf16(x2 * bf16((x0 + x1) * rsqrt(mean(x0 * x0) + 1e-06)))"
    few, many = (compile_fused_quantize(norm, (B16,) * 3, 4096, vectors=(2,), m=m).sass for m in (1, 4096))
    before, _, after = few.partition(WAIT)
    assert before.count("CCTL.E.PF2") == 1 and "LDG" not in before and "CCTL.E.PF2" not in after
    assert "CCTL.E.PF2" not in many


def test_attention_moves_its_first_positions_to_l2_before_the_wait() -> None:
    """Slots and lengths are read before it for their addresses, and again after it."""
    before, _, after = compile_attend(E4M3, batch=1).sass.partition(WAIT)
    assert before.count("CCTL.E.PF2") == 4, "keys, values, and the scales of both"
    for part in (before, after):
        assert len(re.findall(r"LDG\.E(\.64)?\.STRONG", part)) == 2
    assert "LDGSTS" not in before and "STG" not in before
    assert "CCTL.E.PF2" not in compile_attend(E4M3, batch=1, tokens=512).sass


def test_an_old_driver_gets_kernels_that_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    def option(version: int) -> bool:
        class Driver:
            def cuDriverGetVersion(self, found: Any) -> int:  # noqa: N802  # a function of the driver
                found._obj.value = version
                return 0

        driver_version.cache_clear()
        monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
        (call,) = quantize_calls(B16, 64, 512, (1, 128), E4M3)
        return "launch_pdl" in call.options

    try:
        assert [option(version) for version in (12020, 12030, 13000)] == [False, True, True]
    finally:
        driver_version.cache_clear()


def test_a_generation_without_the_feature_has_none_of_the_instructions() -> None:
    other = replace(HOPPER, name="other", limits=replace(HOPPER.limits, overlap=False))
    x, q = (torch.empty(64, 512, dtype=dtype, device="meta") for dtype in (B16, E4M3))
    family = QUANTIZE.family(other)
    config = family.choose(QuantizeProblem(64, 512, (1, 128)))
    scale = torch.empty(64, 4, device="meta")
    (call,) = family.calls(config, QuantizeOperands(x, q, scale, (1, 128), "deepseek"))
    (own,) = quantize_calls(B16, 64, 512, (1, 128), E4M3)
    assert "launch_pdl" in own.options and "launch_pdl" not in call.options
    assert not waits(other.compile(call))
