"""The choice of a configuration: what is refused, with which sentence, and what is preferred."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codegen.tiling import (
    SHARED_MEMORY_LIMIT,
    GemmConfig,
    GemmProblem,
    all_configs,
    bucket,
    choose,
    estimated_time,
    quantize_config,
    refusal,
)
from qcompiler.errors import CodegenError

TMA = GemmConfig(64, 128, 128, 4, 3, 16, "tma")
FINE = GemmProblem(4096, 4096, 4096)
sizes = st.integers(1, 40000)


@pytest.mark.parametrize(
    ("config", "problem", "sentence"),
    [
        (replace(TMA, block_k=64), FINE, "a scale spans 128 of K, the step is 64"),
        (replace(TMA, block_n=96), FINE, "a tile 96 wide does not divide the 128 columns of a weight scale"),
        (replace(TMA, block_n=256), FINE, "a tile 256 wide does not divide the 128 columns of a weight scale"),
        (replace(TMA, block_m=32), FINE, "4 warps need a multiple of 64 rows, the tile has 32"),
        (replace(TMA, warps=8), FINE, "8 warps need a multiple of 128 rows, the tile has 64"),
        (replace(TMA, warps=6), FINE, "6 warps are no whole number of warpgroups of 4"),
        (replace(TMA, block_m=128), FINE, "two FP32 tiles take 256 registers of a thread, 160 are to be had"),
        (replace(TMA, stages=9), FINE, "9 stages need 238592 bytes of shared memory, a block may have 232448"),
        (TMA, replace(FINE, k=4100), "the copy engine needs K to be a multiple of 16, it is 4100"),
        (TMA, replace(FINE, n=4100), "the copy engine needs output rows of a multiple of 16 bytes, they have 8200"),
        (TMA, replace(FINE, aligned=False), "the copy engine needs operands that start at a multiple of 16 bytes"),
    ],
)
def test_each_refusal_is_a_sentence(config: GemmConfig, problem: GemmProblem, sentence: str) -> None:
    assert refusal(config, problem) == sentence


def test_what_fits_is_not_refused() -> None:
    assert refusal(TMA, FINE) is None
    assert refusal(TMA, replace(FINE, n=4100, out_bytes=4)) is None
    assert refusal(replace(TMA, variant="pointers"), GemmProblem(3, 7, 5, aligned=False)) is None
    assert "nothing to multiply" in str(refusal(TMA, replace(FINE, m=0)))
    assert "beyond 32 bits" in str(refusal(TMA, replace(FINE, m=2**31)))


def test_configurations_are_few_and_lawful() -> None:
    configs = all_configs()
    assert 1 < len(configs) <= 8 and len(set(configs)) == len(configs)
    for config in configs:
        for out_bytes in (2, 4):
            assert refusal(config, replace(FINE, out_bytes=out_bytes)) is None
            assert config.shared_memory(out_bytes) <= SHARED_MEMORY_LIMIT


@given(sizes, sizes, sizes, st.sampled_from([2, 4]), st.booleans(), st.integers(1, 200))
def test_every_problem_has_a_lawful_choice(m: int, n: int, k: int, out_bytes: int, aligned: bool, sms: int) -> None:
    problem = GemmProblem(m, n, k, sms, out_bytes, aligned)
    config = choose(problem)
    assert config in all_configs() and refusal(config, problem) is None
    assert all(
        estimated_time(config, problem) <= estimated_time(other, problem)
        for other in all_configs()
        if refusal(other, problem) is None
    )


def test_every_configuration_can_be_chosen() -> None:
    problems = [
        GemmProblem(m, n, 4096, aligned=aligned)
        for m in (64, 128, 512, 4096)
        for n in (512, 4096)
        for aligned in (True, False)
    ]
    assert {choose(problem) for problem in problems} == set(all_configs())


def test_big_products_use_the_copy_engine_and_small_ones_small_tiles() -> None:
    assert choose(FINE).variant == "tma"
    small = choose(GemmProblem(64, 4096, 7168))
    assert small.block_m * small.block_n < TMA.block_m * TMA.block_n


def test_no_configuration_is_an_error_with_all_reasons() -> None:
    with pytest.raises(CodegenError, match="no kernel configuration can run this product") as caught:
        choose(replace(FINE, m=2**31))
    assert str(caught.value).count("beyond 32 bits") == len(all_configs())


@given(st.integers(1, 2**30))
def test_buckets_are_powers_of_two_that_hold_the_rows(m: int) -> None:
    size = bucket(m)
    assert size >= max(m, 64) and size & (size - 1) == 0
    assert size == 64 or size < 2 * m


@pytest.mark.parametrize("block_k", [32, 64, 128, 256, 512])
def test_quantization_tiles_are_powers_of_two(block_k: int) -> None:
    for m in (1, 512, 513, 10**6):
        rows = quantize_config(m, block_k).block_m
        assert rows >= 1 and rows & (rows - 1) == 0
