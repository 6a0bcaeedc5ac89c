"""The choice of a configuration: refused ones with their messages, and preferences."""

from dataclasses import replace

import pytest
from hopper_kernels import GLUON, all_configs, choose, estimated_time, gemm_template, refusal, shared_memory
from hopper_kernels import WARP as WARPS
from hypothesis import given
from hypothesis import strategies as st

from codegen.targets.hopper import HOPPER
from codegen.templates.gemm import GemmConfig, GemmProblem, Kind, bucket, tiles_of
from codegen.templates.gemm_template import DEEPEST_INT8, MOST_SPLITS, SHORTEST_SPLIT
from codegen.templates.quantize import LONGEST_ROW, quantize_config, tensor_config, token_config
from codegen.templates.template import ceil_div
from codegen.templates.warp import WarpGemm
from qcompiler.errors import CodegenError
from qcompiler.numerics import ALL

TMA = GemmConfig(64, 128, 128, 4, 3, 16, "tma")
FINE = GemmProblem(4096, 4096, 4096)


def split_depth(config: GemmConfig, m: int, n: int, k: int, sms: int) -> int:
    return gemm_template(config).split_depth(config, m, n, k, sms)


def out_buffers(config: GemmConfig, out_bytes: int = 2, stage_scales: int = 1) -> int:
    template = gemm_template(config)
    assert isinstance(template, WarpGemm)
    return template.out_buffers(config, out_bytes, stage_scales)


sizes = st.integers(1, 40000)


@pytest.mark.parametrize(
    ("config", "problem", "sentence"),
    [
        (replace(TMA, block_k=64), FINE, "a scale spans 128 of K, the step is 64"),
        (replace(TMA, block_n=96), FINE, "a tile 96 wide does not divide the 128 columns of a weight scale"),
        (replace(TMA, block_n=256), FINE, "a tile 256 wide does not divide the 128 columns of a weight scale"),
        (replace(TMA, block_m=32), FINE, "4 warps need a multiple of 64 rows, the tile has 32"),
        (replace(TMA, warps=8), FINE, "8 warps need a multiple of 128 rows, the tile has 64"),
        (replace(TMA, warps=6), FINE, "6 warps are not a whole number of warpgroups of 4"),
        (replace(TMA, block_m=128), FINE, "two FP32 tiles take 256 registers per thread, the limit is 160"),
        (replace(TMA, stages=9), FINE, "9 stages need 239616 bytes of shared memory, a block may use 232448"),
        (TMA, replace(FINE, k=4100), "the copy engine needs K to be a multiple of 16, got 4100"),
        (TMA, replace(FINE, n=4100), "the copy engine needs output rows of a multiple of 16 bytes, they have 8200"),
        (TMA, replace(FINE, aligned=False), "the copy engine needs operands that start at a multiple of 16 bytes"),
    ],
)
def test_each_refusal_is_a_sentence(config: GemmConfig, problem: GemmProblem, sentence: str) -> None:
    assert refusal(config, problem) == sentence


WARP = GemmConfig(256, 128, 128, 8, 3, 16, "warp")
NARROW = GemmConfig(64, 128, 128, 4, 4, 1, "narrow")


@pytest.mark.parametrize(
    ("config", "problem", "sentence"),
    [
        (
            WARP,
            replace(FINE, scale_columns=False),
            "the copy engine needs the activation's scales in columns that start at multiples of 16 bytes",
        ),
        (
            NARROW,
            replace(FINE, scale_columns=False),
            "the copy engine needs the activation's scales in columns that start at multiples of 16 bytes",
        ),
        (WARP, replace(FINE, n=4100), "the copy engine needs output rows of a multiple of 16 bytes, they have 8200"),
        (NARROW, replace(FINE, k=4100), "the copy engine needs K to be a multiple of 16, got 4100"),
        (replace(WARP, block_k=64), FINE, "the Gluon kernels have stages of 128 of K, here it is 64"),
        (
            replace(WARP, block_k=64),
            replace(FINE, x_block=64),
            "the Gluon kernels have stages of 128 of K, here it is 64",
        ),
        (
            replace(NARROW, block_k=256),
            replace(FINE, kind="rows_i8"),
            "the Gluon kernels have stages of 128 of K, here it is 256",
        ),
        (replace(WARP, stages=5), FINE, "5 stages need 285696 bytes of shared memory, a block may use 232448"),
        (
            GemmConfig(192, 128, 128, 12, 4, 16, "warp"),
            replace(FINE, out_bytes=4),
            "4 stages need 267264 bytes of shared memory, a block may use 232448",
        ),
        (replace(WARP, block_m=192), FINE, "8 warps need a multiple of 128 rows, the tile has 192"),
        (replace(WARP, block_m=384), FINE, "two FP32 tiles take 256 registers per thread, the limit is 192"),
        (
            replace(WARP, block_m=384, warps=12),
            FINE,
            "two FP32 tiles take 192 registers per thread, the limit is 128",
        ),
        (replace(NARROW, block_m=128), FINE, "two FP32 tiles take 256 registers per thread, the limit is 160"),
        (replace(NARROW, block_n=64, warps=8), FINE, "8 warps need a multiple of 128 columns, the tile has 64"),
    ],
)
def test_refusals_of_the_gluon_kernels(config: GemmConfig, problem: GemmProblem, sentence: str) -> None:
    assert refusal(config, problem) == sentence


def test_scales_in_rows_leave_only_the_portable_kernels() -> None:
    for m in (1, 16, 64, 256, 1024, 4096):
        assert choose(GemmProblem(m, 4096, 4096)).variant in GLUON
        assert choose(GemmProblem(m, 4096, 4096, scale_columns=False)).variant not in GLUON


@given(sizes, sizes, sizes, st.integers(1, 200))
def test_splits_fill_the_device_and_none_is_empty(m: int, n: int, k: int, sms: int) -> None:
    steps, tiles = ceil_div(k, 128), tiles_of(NARROW, m, n)
    depth = split_depth(NARROW, m, n, k, sms)
    splits = ceil_div(steps, depth)
    assert (splits - 1) * depth < steps <= splits * depth
    assert splits == 1 or (splits <= MOST_SPLITS and tiles * splits <= 2 * sms and depth >= SHORTEST_SPLIT)
    assert split_depth(WARP, m, n, k, sms) == steps
    # Two programs of the narrow kernel run on a multiprocessor, and one of the other.
    assert split_depth(replace(NARROW, block_m=64, variant="split"), m, n, k, 2 * sms) == depth


I8 = GemmConfig(128, 128, 128, 4, 3, 16, "tma")


@pytest.mark.parametrize(
    ("config", "problem", "sentence"),
    [
        (TMA, replace(FINE, x_block=64), "a scale spans 64 of K, the step is 128"),
        (replace(TMA, block_k=64), replace(FINE, x_block=ALL), "a scale spans 128 of K, the step is 64"),
        (
            replace(TMA, block_k=256),
            replace(FINE, kind="rows_f8"),
            "FP8 sums are promoted every 128 of K, the step is 256",
        ),
        (
            I8,
            replace(FINE, kind="rows_i8", k=DEEPEST_INT8 + 1),
            "a sum of 133145 products of INT8 codes can exceed 32 bits, K may be at most 133144",
        ),
        (
            replace(I8, block_n=256),
            replace(FINE, kind="rows_i8"),
            "one INT32 tile takes 256 registers per thread, the limit is 160",
        ),
        (I8, replace(FINE, kind="rows_f8"), "two FP32 tiles take 256 registers per thread, the limit is 160"),
    ],
)
def test_refusals_of_the_other_kinds(config: GemmConfig, problem: GemmProblem, sentence: str) -> None:
    assert refusal(config, problem) == sentence


def test_the_deepest_int8_sum_fits_32_bits() -> None:
    assert DEEPEST_INT8 * 127**2 < 2**31 <= (DEEPEST_INT8 + 1) * 127**2
    assert refusal(I8, replace(FINE, kind="rows_i8", k=DEEPEST_INT8 - DEEPEST_INT8 % 16)) is None


def test_configurations_that_fit_are_not_refused() -> None:
    assert refusal(TMA, FINE) is None
    assert refusal(TMA, replace(FINE, n=4100, out_bytes=4)) is None
    assert refusal(replace(TMA, variant="pointers"), GemmProblem(3, 7, 5, aligned=False)) is None
    assert "nothing to multiply" in str(refusal(TMA, replace(FINE, m=0)))
    assert "beyond 32 bits" in str(refusal(TMA, replace(FINE, m=2**31)))


FAMILIES: tuple[tuple[Kind, int], ...] = (
    ("tiles", 128), ("tiles", 64), ("tiles", 32), ("tiles", 256), ("tiles", ALL), ("rows_f8", ALL), ("rows_i8", ALL),
)  # fmt: skip
families = pytest.mark.parametrize(("kind", "x_block"), FAMILIES)


@families
def test_configurations_are_few_and_valid(kind: Kind, x_block: int) -> None:
    configs = all_configs(kind, x_block)
    assert 1 < len(configs) <= 16 and len(set(configs)) == len(configs)
    for config in configs:
        for out_bytes in (2, 4):
            problem = replace(FINE, out_bytes=out_bytes, kind=kind, x_block=x_block)
            fits = shared_memory(config, out_bytes, problem.stage_scales) <= HOPPER.limits.shared_memory
            assert (refusal(config, problem) is None) == fits
            # The widest tile leaves no room for FP32 rows, which are rare.
            assert fits or (config.variant in WARPS and out_bytes == 4)


@given(
    sizes, sizes, sizes, st.sampled_from([2, 4]), st.booleans(), st.integers(1, 200), st.sampled_from(FAMILIES),
    st.booleans(),
)  # fmt: skip
def test_every_problem_has_a_valid_choice(
    m: int, n: int, k: int, out_bytes: int, aligned: bool, sms: int, family: tuple[Kind, int], columns: bool
) -> None:
    problem = GemmProblem(m, n, k, sms, out_bytes, aligned, *family, columns)
    config = choose(problem)
    assert config in all_configs(*family) and refusal(config, problem) is None
    assert all(
        estimated_time(config, problem) <= estimated_time(other, problem)
        for other in all_configs(*family)
        if refusal(other, problem) is None
    )


@families
def test_every_configuration_can_be_chosen(kind: Kind, x_block: int) -> None:
    problems = [
        GemmProblem(m, n, k, aligned=aligned, kind=kind, x_block=x_block, scale_columns=columns)
        for m in (16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
        for n in (512, 2112, 4096, 7168, 10240, 12800)
        for k in (512, 2048, 4096, 8192)
        for aligned in (True, False)
        for columns in (True, False)
    ]
    assert {choose(problem) for problem in problems} == set(all_configs(kind, x_block))


def test_big_gemms_use_the_copy_engine_and_small_ones_small_tiles() -> None:
    assert choose(FINE).variant == "warp"
    assert choose(replace(FINE, scale_columns=False)).variant == "tma"
    for m in (16, 32):
        assert choose(GemmProblem(m, 4096, 7168)) == replace(NARROW, block_m=m, stages={16: 6, 32: 5}[m])
    assert choose(GemmProblem(64, 4096, 7168)).variant == choose(GemmProblem(128, 4096, 7168)).variant == "team"
    assert choose(GemmProblem(128, 576, 7168)).variant == "split"
    small = choose(GemmProblem(64, 4096, 7168, scale_columns=False))
    assert small.block_m * small.block_n < TMA.block_m * TMA.block_n


@pytest.mark.parametrize(
    ("kind", "x_block", "scales"),
    [
        ("tiles", 32, 4),
        ("tiles", 64, 2),
        ("tiles", 128, 1),
        ("tiles", 512, 1),
        ("tiles", ALL, 1),
        ("rows_f8", ALL, 0),
        ("rows_i8", ALL, 0),
    ],
)
def test_scales_of_x_need_space_in_each_stage(kind: Kind, x_block: int, scales: int) -> None:
    assert replace(FINE, kind=kind, x_block=x_block).stage_scales == scales
    for config, rows in ((WARP, 256), (replace(NARROW, block_m=16), 32)):
        assert shared_memory(config, 2, scales) - shared_memory(config, 2, 0) == config.stages * rows * 4 * scales


def test_consumers_have_a_buffer_per_wave_if_it_fits() -> None:
    assert [out_buffers(WARP, out_bytes) for out_bytes in (2, 4)] == [2, 1]
    assert [out_buffers(replace(WARP, stages=stages), 2, 0) for stages in (3, 4)] == [2, 1]
    assert out_buffers(GemmConfig(192, 128, 128, 12, 4, 16, "warp"), 4) == 1
    for out_bytes in (2, 4):
        assert refusal(WARP, replace(FINE, out_bytes=out_bytes)) is None


def test_the_gluon_kernels_run_all_scales() -> None:
    for m in (1024, 4096, 8192):
        for kind, x_block in FAMILIES:
            assert choose(GemmProblem(m, 4096, 4096, kind=kind, x_block=x_block)).variant == "warp"
    for m in (16, 64):
        for kind, x_block in FAMILIES:
            config = choose(GemmProblem(m, 4096, 7168, kind=kind, x_block=x_block))
            assert config.variant in ("narrow", "split", "team") and min(m, 32) <= config.block_m <= 64


def test_no_configuration_is_an_error_with_all_reasons() -> None:
    with pytest.raises(CodegenError, match="no kernel configuration can run this GEMM") as caught:
        choose(replace(FINE, m=2**31))
    assert str(caught.value).count("beyond 32 bits") == len(all_configs())


@given(st.integers(1, 2**30))
def test_buckets_are_powers_of_two_that_hold_the_rows(m: int) -> None:
    size = bucket(m)
    assert size >= max(m, 16) and size & (size - 1) == 0
    assert size == 16 or size < 2 * m


@pytest.mark.parametrize("block_k", [32, 64, 128, 256, 512])
def test_quantization_tiles_are_powers_of_two(block_k: int) -> None:
    for m in (1, 512, 513, 10**6):
        rows = quantize_config(m, block_k).block_m
        assert rows >= 1 and rows & (rows - 1) == 0


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_tiles_of_whole_rows_and_tensors(m: int, k: int) -> None:
    tile = token_config(m, k)
    for size in (tile.block_m, tile.block_k, tile.warps, tensor_config(m).block_m, tensor_config(m).block_k):
        assert size >= 1 and size & (size - 1) == 0
    assert k > LONGEST_ROW or tile.block_k >= k
    assert tile.block_m * tile.block_k <= 32 * 32 * tile.warps, "more than 32 elements a thread"
