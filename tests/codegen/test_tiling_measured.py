"""The choice of a configuration compared with measured times of all configurations."""

import json
from pathlib import Path
from typing import Any

import pytest
from hopper_kernels import all_configs, all_fused_configs, choose

from codegen.targets.hopper import HOPPER
from codegen.templates.fused import FUSED_GEMM, FusedGemmProblem, Separate
from codegen.templates.gemm import GemmProblem, Kind, bucket
from qcompiler.numerics import ALL

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
DEVICES = ("h100", "h200")
KINDS: dict[str, tuple[Kind, int]] = {
    "tiles": ("tiles", 128), "tiles_64": ("tiles", 64), "tiles_32": ("tiles", 32), "rows_f8": ("rows_f8", ALL),
    "rows_i8": ("rows_i8", ALL),
}  # fmt: skip
kinds = pytest.mark.parametrize("name", KINDS)


# Where all configurations of a kind were measured last.
MEASURED = {"tiles": "h200", "tiles_64": "h100", "tiles_32": "h100", "rows_f8": "h100", "rows_i8": "h100"}


def times(name: str, device: str) -> dict[tuple[int, int, int, bool], dict[str, float]]:
    """(Shape, whether weights came from memory) -> configuration -> microseconds."""
    stored: dict[str, Any] = json.loads((RESULTS / f"{device}-heuristic.json").read_text())
    names = stored["configs"].get(name, [])
    return {
        (row["m"], row["n"], row["k"], row["cold"]): {
            config: us for config, us in zip(names, row["us"], strict=True) if us is not None
        }
        for row in stored["rows"]
        if row["kind"] == name
    }


@pytest.mark.parametrize(("name", "device"), [*MEASURED.items(), ("tiles", "h100")])
def test_no_choice_is_much_slower_than_the_best(name: str, device: str) -> None:
    """Of the choices that were measured: the tiles' times on an H100 lack the newest configurations."""
    kind, x_block = KINDS[name]
    ratios = {}
    for (m, n, k, cold), found in times(name, device).items():
        chosen = str(choose(GemmProblem(bucket(m), n, k, kind=kind, x_block=x_block)))
        if chosen in found or device == MEASURED[name]:
            ratios[m, n, k, cold] = min(found.values()) / found[chosen]
    assert len(ratios) > 30
    assert not {shape: ratio for shape, ratio in ratios.items() if ratio < 0.85}
    assert sum(ratio < 0.9 for ratio in ratios.values()) <= max(len(ratios) // 100, 1)


# Parts of the weight, operands other than the sums, whether the result is quantized: see `benchmarks/epilogues.py`.
EXPRESSIONS = {
    "SwiGLU, quantize": (2, 0, True),
    "GELU, quantize": (1, 0, True),
    "GELU": (1, 0, False),
    "residual": (1, 1, False),
}


@pytest.mark.parametrize("device", DEVICES)
def test_the_choice_between_one_kernel_and_two(device: str) -> None:
    ratios = []
    for row in json.loads((RESULTS / f"{device}-epilogues.json").read_text())["rows"]:
        m, n, k = map(int, row["M, N, K"].split(", "))
        parts, others, quantized = EXPRESSIONS[row["expression"]]
        problem = FusedGemmProblem(m, n, k, parts, others=others, block=(1, 128) if quantized else None)
        forms = [config for config in all_fused_configs() if config.parts == parts]
        found: dict[object, float] = dict(zip(forms, map(float, row["forms"].split()), strict=True))
        found[Separate()] = row["two kernels"]
        ratios.append(min(found.values()) / found[FUSED_GEMM.family(HOPPER).choose(problem)])
    assert len(ratios) == 56 and min(ratios) >= 0.95


@kinds
def test_exactly_the_configurations_that_can_be_chosen_were_measured(name: str) -> None:
    measured = {config for found in times(name, MEASURED[name]).values() for config in found}
    assert measured == set(map(str, all_configs(*KINDS[name])))
