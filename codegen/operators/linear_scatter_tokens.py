"""The operator `linear_scatter_tokens`: a quantized matmul, and this rank's tokens of its sum over all ranks.

GPUs of one host store the rows for each rank in that rank's memory: see `codegen.kernels.inboxes`. Elsewhere, and for
few rows, a collective follows the matmul.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

from torch import Tensor

from codegen.cpu.gemm import scaled_linear_on_cpu
from codegen.inboxes import Inboxes, slot_bytes
from codegen.launching.launch import FLOATS, as_rows, on
from codegen.launching.replay import empty, replayed, state
from codegen.operators.operator import Operator, declare
from codegen.operators.scaled_linear import (
    ScaledLinear,
    check_scaled_linear,
    multiply_into,
    scaled_linear_fake,
    scaled_linear_on_gpu,
)
from codegen.targets.cuda import gpu_at
from codegen.templates.hopper import has_scale_columns
from codegen.templates.inboxes import OPEN_INBOXES, SUM_INBOX, OpenOperands, OpenProblem, SumOperands, SumProblem
from qcompiler.dialects.coll_tokens import in_layout, is_cut, reduce_scatter_tokens, share
from qcompiler.distributed.communicator import current

FEWEST = 512
"""Rows for each rank from which on parts of a matmul run one after the other; fewer do not fill the GPU."""


class LinearScatterTokens(NamedTuple):
    """The arguments of the operator."""

    linear: ScaledLinear
    mesh: str
    ranks: int
    few: int

    @property
    def tokens(self) -> int:
        """Rows of the matmul."""
        return self.linear.x_q.shape[:-1].numel()

    @property
    def part(self) -> tuple[int, int]:
        """Rows and columns of a rank's part of the result."""
        return cast(int, share(self.tokens, self.ranks, self.few)), self.linear.w_q.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a rank's part of the result."""
        return (*[1] * (self.linear.x_q.dim() - 2), *self.part)

    @property
    def slot(self) -> int:
        """Bytes of an inbox for the terms of each rank."""
        return slot_bytes(*self.part, self.linear.out_dtype)

    @property
    def in_parts(self) -> bool:
        """Whether a matmul runs for the rows of each rank."""
        few = not is_cut(self.tokens, self.ranks, self.few) or self.part[0] < FEWEST
        return not few and self.linear.out_dtype in FLOATS


def _given(*arguments: Any) -> LinearScatterTokens:
    return LinearScatterTokens(ScaledLinear(*arguments[:8]), *arguments[8:])


def _on_gpu(*arguments: Any) -> Tensor:
    given = _given(*arguments)
    x, linear = given.linear.x_q, given.linear
    inboxes = current().inboxes(x, given.ranks * given.slot, given.mesh) if given.in_parts else None
    if inboxes is not None:
        ways, turn = inboxes.ways, inboxes.next_turn()
        fixed = (*linear.x_block, *linear.w_block, *arguments[7:], ways.rank, ways.patience, turn, inboxes.bytes)
        tensors = (*linear[:5], *inboxes.parts, ways.memories, ways.steps)
        return replayed(partial(_through_inboxes, inboxes, turn), ("linear_scatter_tokens", *fixed), tensors, given)
    if state.planner is not None:  # a warm-up sends nothing; the first call may find inboxes
        return _collected(given)
    return _scattered(scaled_linear_on_gpu(*linear), given)


def _scattered(terms: Tensor, given: LinearScatterTokens) -> Tensor:
    return reduce_scatter_tokens(terms, mesh=given.mesh, ranks=given.ranks, few=given.few)


def _collected(given: LinearScatterTokens) -> Tensor:
    """Launches the matmuls of both ways, and none of the kernels that wait for other ranks."""
    out = scaled_linear_on_gpu(*given.linear)
    if given.in_parts:
        place = empty(given.part, out.dtype, out.device)
        _store_parts(given, [place] * given.ranks, 0)
    return out.new_empty(given.shape)


def _through_inboxes(inboxes: Inboxes, turn: int, given: LinearScatterTokens) -> Tensor:
    check_scaled_linear(given.linear)
    x, ways, (rows, columns) = given.linear.x_q, inboxes.ways, given.part
    out = empty(given.shape, given.linear.out_dtype, x.device)
    gpu = gpu_at(x.device)
    opening, summing = OPEN_INBOXES.family(gpu), SUM_INBOX.family(gpu)
    with on(x.device):
        opening.launch(opening.choose(OpenProblem(given.ranks)), OpenOperands(ways, turn))
        places = [inboxes.place(to, turn, given.slot, given.part, out.dtype) for to in range(given.ranks)]
        _store_parts(given, places, ways.rank)
        problem = SumProblem(out.nbytes, gpu.limits.multiprocessors_of(x.device.index))
        stored = max(min(given.tokens - ways.rank * rows, rows), 0) * columns
        operands = SumOperands(out, ways, turn, inboxes.bytes, given.slot, stored)
        summing.launch(summing.choose(problem), operands)
    return out


def _store_parts(given: LinearScatterTokens, places: Sequence[Tensor], rank: int) -> None:
    """Multiplies the rows of each rank into its place; own rows are last, so that the others' arrive meanwhile."""
    linear, size = given.linear, given.part[0]
    codes, scales = as_rows(linear.x_q).contiguous(), linear.x_s.reshape(-1, linear.x_s.shape[-1])
    for ahead in range(1, given.ranks + 1):
        to = (rank + ahead) % given.ranks
        rows = slice(to * size, min((to + 1) * size, given.tokens))
        if rows.start < rows.stop:
            part = linear._replace(x_q=codes[rows], x_s=_rows_of(scales, rows, given.tokens))
            multiply_into(places[to][: rows.stop - rows.start], part)


def _rows_of(scales: Tensor, rows: slice, tokens: int) -> Tensor:
    """The scales of some rows; a copy if the copy engine could not read these, but could read all."""
    if scales.shape[0] != tokens:  # one for all rows
        return scales
    part = scales[rows]
    return in_layout(part, "col_major") if has_scale_columns(scales) and not has_scale_columns(part) else part


def _on_cpu(*arguments: Any) -> Tensor:
    given = _given(*arguments)
    return _scattered(scaled_linear_on_cpu(*given.linear), given)


def _fake(*arguments: Any) -> Tensor:
    given = _given(*arguments)
    return scaled_linear_fake(*given.linear).new_empty(given.shape)


LINEAR_SCATTER_TOKENS_SCHEMA = (
    "linear_scatter_tokens(Tensor x_q, Tensor x_s, Tensor w_q, Tensor w_s, Tensor? bias, int[] x_block, int[] w_block, "
    "ScalarType out_dtype, str mesh, int ranks, int few) -> Tensor"
)
declare(Operator(LINEAR_SCATTER_TOKENS_SCHEMA, _on_cpu, _on_gpu, _fake, runs="coll.linear_scatter_tokens"))
