"""Matmuls that store rows in the memory of other GPUs; between two processes: `tests/compiler/test_sharded_gpu.py`."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hopper_kernels import meta
from inbox_kernels import compile_open, compile_sum

from benchmarks.sanitizing.place import OnGpu, Rehearsal
from benchmarks.sanitizing.products import quantized
from benchmarks.sanitizing.ranks import stored_matmuls
from codegen.inboxes import LARGEST, SMALLEST, Growing, Shared
from codegen.operators.linear_scatter_tokens import FEWEST
from codegen.operators.operator import OPERATORS
from codegen.peer_memory import PeerMemory
from codegen.templates.inboxes import ALIGNED, HEAD_BYTES
from qcompiler import numerics
from qcompiler.dialects.coll_linear import linear_scatter_tokens
from qcompiler.distributed.communicator import communicating, current
from qcompiler.distributed.simulation import Simulation
from qcompiler.ir import Mesh


def test_all_accesses_of_the_sum_are_of_16_bytes() -> None:
    code = compile_sum(8, 512, 8192)
    vectors = 2  # of a thread: 8 KB by 8 warps
    assert (code.wide_loads, code.wide_stores) == (vectors * 8, vectors)
    assert "MEMBAR.ALL.SYS" in code.sass and "LDG.E.STRONG.SYS" in code.sass


def test_a_rank_signals_all_others_before_it_waits() -> None:
    code = compile_open(4)
    assert code.warps == 1 and code.sass.count("ATOMG.E.EXCH.STRONG.SYS") == code.sass.count("MEMBAR.ALL.SYS") == 3


@pytest.mark.gpu
def test_two_ranks_on_one_gpu() -> None:
    assert [*stored_matmuls(OnGpu())]  # each result is compared


def test_the_launches_without_a_gpu() -> None:
    rehearsal = Rehearsal()
    assert [*stored_matmuls(rehearsal)]
    names = [call.kernel.fn.__name__ for call in rehearsal.calls.values()]
    assert {"open_inboxes", "sum_inbox", "warp_gemm"} <= {*names}


@pytest.mark.parametrize("tokens", [7, 48, 1025])
def test_ranks_get_their_tokens_of_the_sum(tokens: int) -> None:
    """On a CPU: the bits of the definition."""
    x_format, w_format = (numerics.format_of(block, torch.float8_e4m3fn) for block in ((1, 128), (128, 128)))
    w = quantized(128, 256, [128, 128], seed=2)

    def program() -> tuple[torch.Tensor, torch.Tensor]:
        codes = quantized(tokens, 256, [1, 128], seed=current().place("tp"))
        run = OPERATORS["linear_scatter_tokens"].on_cpu
        got = run(*codes, *w, None, [1, 128], [128, 128], torch.float32, "tp", 2, 48)
        return got, linear_scatter_tokens(
            *codes, *w, x_format=x_format, w_format=w_format, out_dtype=torch.float32, mesh="tp", ranks=2, few=48
        )

    found = Simulation(Mesh.parse("tp=2")).run([program, program])
    for got, want in found:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    rows = -(-tokens // 2) if tokens >= 48 else tokens
    assert [got.shape[0] for got, _ in found] == [rows, rows]


def test_shapes_without_data() -> None:
    e4m3 = {"dtype": torch.float8_e4m3fn}
    operands = meta(2, 700, 256, **e4m3), meta(2, 700, 2), meta(384, 256, **e4m3), meta(3, 2), None
    fake = partial(OPERATORS["linear_scatter_tokens"].fake, *operands, [1, 128], [128, 128], torch.bfloat16, "tp")
    assert fake(4, 512).shape == (1, 350, 384) and fake(4, 2048).shape == (1, 1400, 384)


def test_inboxes_grow_and_are_kept() -> None:
    sizes: list[int] = []

    def connect(size: int) -> Shared:
        sizes.append(size)
        return Shared((torch.zeros(1),), torch.zeros(1, dtype=torch.int64), 0, 1)

    growing = Growing()
    assert growing.of(1, None) is None, "nothing may be made while a graph is captured"
    first = growing.of(1, connect)
    assert first is growing.of(SMALLEST, None) and sizes == [HEAD_BYTES + 2 * SMALLEST]
    assert growing.of(SMALLEST + 1, None) is None
    second = growing.of(SMALLEST + 1, connect)
    assert second is not None and second.bytes == 2 * SMALLEST and growing.made == [first, second]
    assert growing.of(LARGEST + 1, connect) is None
    assert [second.next_turn() for _ in range(3)] == [1, 0, 1]


def test_places_of_all_ranks_do_not_overlap() -> None:
    growing = Growing()
    memory = torch.zeros(HEAD_BYTES + 2 * SMALLEST, dtype=torch.uint8)
    found = growing.of(1, lambda size: Shared((memory, memory), torch.zeros(2, dtype=torch.int64), 1, 1))
    assert found is not None
    place = found.place(0, 1, 4 * ALIGNED, (3, 64), torch.bfloat16)
    assert place.shape == (3, 64) and place.is_contiguous()
    assert place.data_ptr() - memory.data_ptr() == HEAD_BYTES + SMALLEST + 4 * ALIGNED


def test_matmuls_on_a_cpu_have_no_inboxes() -> None:
    group: Any = SimpleNamespace(size=lambda: 2, group_name="tp")
    assert PeerMemory().inboxes(torch.ones(FEWEST, 8), 1, group) is None


def test_few_rows_are_not_stored_in_parts() -> None:
    """Parts of a matmul would not fill a GPU, so the inboxes are not even asked for."""
    asked: list[int] = []
    ranks: Any = SimpleNamespace(inboxes=lambda x, size, mesh: asked.append(size), all_reduce=lambda x, mesh: x)
    rehearsal = Rehearsal()
    x, w = (
        quantized(40, 256, [1, 128], layout="col_major"),
        quantized(128, 256, [128, 128], seed=1),
    )
    operator = OPERATORS["linear_scatter_tokens"]
    arguments = (*x, *w, None, [1, 128], [128, 128], torch.bfloat16, "tp", 2, 16)
    with communicating(ranks):
        rehearsal.call(operator.on_gpu, lambda *_: None, *arguments)
    assert asked == []
