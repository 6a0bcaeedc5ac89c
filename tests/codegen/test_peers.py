"""Collectives through the memory of other GPUs; between two GPUs: `tests/compiler/test_sharded_gpu.py`."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from hopper_kernels import meta
from peer_kernels import compile_exchange

from benchmarks.sanitizing.place import OnGpu, Place
from benchmarks.sanitizing.ranks import exchanges, fused_sums
from codegen.operators import fused_reduce_quantize
from codegen.operators.operator import OPERATORS
from codegen.peer_memory import PeerMemory
from codegen.targets.cuda import CudaTarget
from codegen.targets.hopper import HOPPER
from codegen.templates.peers import PROGRAMS, REGION_BYTES, PeersProblem, memory_bytes, peers_configs
from qcompiler.errors import CodegenError


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("summed", [False, True])
def test_all_accesses_are_of_16_bytes(ranks: int, scattered: bool, summed: bool) -> None:
    code = compile_exchange(ranks, (16, 8192), scattered=scattered, summed=summed)
    tile = 2  # accesses of 16 bytes by a thread
    sent = ranks - 1
    assert code.wide_loads == tile * (1 + (sent if scattered else 0) + ranks)
    assert code.wide_stores == tile * (sent + (1 if summed else ranks))
    assert "MEMBAR.ALL.SYS" in code.sass and "LDG.E.STRONG.SYS" in code.sass


def test_a_tile_fits_into_a_region() -> None:
    sizes = (1, 4096, 4097, 1 << 20, (1 << 20) + 1, 1 << 23, 1 << 30)
    tiles = [next(iter(peers_configs(PeersProblem(size)))).bytes for size in sizes]
    assert tiles == [4096, 4096, 4096, 4096, 8192, 32768, 32768]
    assert max(tiles) == REGION_BYTES
    assert memory_bytes(8) == PROGRAMS * 8 * (2 * REGION_BYTES + 4)


@pytest.mark.gpu
@pytest.mark.parametrize("family", [exchanges, fused_sums])
def test_two_ranks_on_one_gpu(family: Callable[[Place], Iterator[str]]) -> None:
    assert [*family(OnGpu())]  # each result is compared


def test_tensors_on_a_cpu_are_left_to_torch() -> None:
    peers, group = PeerMemory(), SimpleNamespace(size=lambda: 2, group_name="tp")
    x = torch.ones(2, 8)
    for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "small"):
        assert getattr(peers, name)(x, group) is None
    numbers = torch.zeros(2, dtype=torch.int64), torch.zeros(PROGRAMS, dtype=torch.int32)
    with pytest.raises(CodegenError, match="only on GPUs"):
        torch.ops.qcompiler.exchange(x, *numbers, 0, 1, False, True)


@pytest.mark.parametrize(("scattered", "summed", "shape"), [
    (False, True, (2, 8)), (False, False, (2, 16)), (True, True, (8,)), (True, False, (2, 8)),
])  # fmt: skip
def test_shapes_without_data(scattered: bool, summed: bool, shape: tuple[int, ...]) -> None:
    numbers = meta(2, dtype=torch.int64), meta(PROGRAMS, dtype=torch.int32)
    found = OPERATORS["exchange"].fake(meta(2, 8), *numbers, 0, 1, scattered, summed)
    assert found.shape == shape


def test_what_fits_is_remembered_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def gpu_at(device: torch.device) -> CudaTarget:
        asked.append(device)
        return HOPPER

    monkeypatch.setattr(fused_reduce_quantize, "gpu_at", gpu_at)
    one, two, bf16 = torch.device("cuda", 0), torch.device("cuda", 1), torch.bfloat16

    def fits(rows: int, other: torch.device = one, block: tuple[int, int] = (1, 128)) -> bool:
        kinds = (torch.Size((rows, 4096)), bf16, one), (torch.Size((rows, 4096)), bf16, other)
        expression = "h0 = x0 + x1; h0 * rsqrt(mean(h0 * h0) + 1e-05)"
        return fused_reduce_quantize._fits(kinds, 1, expression, ("h0",), block, torch.float8_e4m3fn)

    fused_reduce_quantize._fits.cache_clear()
    assert [fits(16), fits(16), fits(16, two), fits(1 << 20), fits(16, block=(16, 128))] == [True] * 2 + [False] * 3
    assert asked == [one] * 2  # for 16 rows, and for 1 << 20
