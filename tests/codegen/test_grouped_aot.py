"""The grouped kernels compiled for Hopper without a GPU: required properties of the machine code."""

import pytest
import torch
from hopper_kernels import GROUPED_CONFIGS as CONFIGS
from hopper_kernels import TALL, choose_grouped, compile_grouped, grouped_memory

from codegen.targets.hopper import HOPPER
from codegen.templates.grouped import MOST_GROUPS, GroupedConfig, table_size

configs = pytest.mark.parametrize("config", CONFIGS, ids=str)


@configs
@pytest.mark.parametrize(("groups", "masked"), [(MOST_GROUPS, False), (8, True)])
def test_machine_code(config: GroupedConfig, groups: int, masked: bool) -> None:
    out_dtype = torch.bfloat16 if config is TALL else torch.float32
    code = compile_grouped(config, out_dtype=out_dtype, groups=groups, masked=masked)
    assert (code.local_loads, code.local_stores) == (0, 0), "registers were spilled to local memory"
    # Each consumer has its own code with four instructions of K = 32, for 64 rows of the left operand.
    wide = config.variant == "wide"
    consumers = config.block_m // 64 if wide else 2
    columns = 128 if wide else config.block_m
    assert code.qgmma == 4 * consumers and f"QGMMA.64x{columns}x32.F32.E4M3.E4M3" in code.sass
    # One copy of the weights, one of rows and one of scales per box; the output is stored 64 rows at a time.
    assert (code.tma_loads, code.tma_stores) == ((1 + 2 * consumers, consumers) if wide else (3, 0))
    assert code.shared_memory <= grouped_memory(config, out_dtype.itemsize, groups), (
        "the estimate is not an upper bound"
    )
    # Registers per thread at the start; the consumers then take some from the producer.
    assert code.registers == {2: 168, 3: 128}[consumers]


@pytest.mark.parametrize("out_bytes", [2, 4])
def test_every_choice_fits_shared_memory_and_every_config_is_chosen(out_bytes: int) -> None:
    chosen = {choose_grouped(mean, out_bytes) for mean in range(400)}
    assert chosen == set(CONFIGS) - ({TALL} if out_bytes == 4 else set())
    assert all(grouped_memory(config, out_bytes, MOST_GROUPS) <= HOPPER.limits.shared_memory for config in chosen)


def test_the_table_size_is_a_power_of_two() -> None:
    sizes = {groups: table_size(groups) for groups in (1, 2, 31, 32, 33, 64, 100, 255, 256, 257, MOST_GROUPS)}
    assert all(size >= groups and size & (size - 1) == 0 and size >= 32 for groups, size in sizes.items())
    assert sizes[256] == 256 and sizes[257] == 512 and sizes[1] == 32


def test_tiles_grow_with_the_groups() -> None:
    blocks = [choose_grouped(mean).block_m for mean in (0, 0.1, 8, 8.1, 16, 17, 32, 33, 128, 160, 200, 320, 321, 1e5)]
    assert blocks == [16, 16, 16, 32, 32, 64, 64, 192, 192, 192, 128, 128, 192, 192]
