"""Collectives of the dialect `coll` over the tokens of experts, in the program of one rank.

    %y = coll.gather_chosen_tokens(%x, %experts, [%t]) {few = 64, groups = 8, mesh = "tp", ranks = 2} : bf16[s0, 512]
    %r = coll.reduce_scatter_chosen_tokens(%y, %experts) {few = 64, groups = 8, mesh = "tp", ranks = 2}

`%experts` has the numbers of the experts that each token has chosen, of all tokens, and a rank has `groups / ranks`
consecutive experts. The first operation is `all_gather_tokens` with zeros for tokens that chose none of this rank's
experts, and the second one `reduce_scatter_tokens` of terms in which such tokens are zeros. So a token is sent to, and
returned by, only the ranks that compute it, once. Each token has a fixed place: no counts are exchanged, nothing waits
for the host, and a rank may receive none, or all of them. If a call has fewer than `few` tokens, each rank holds all of
them, and these operations do what the ones over all tokens do.
"""

from collections.abc import Sequence
from math import prod

from torch import Tensor

from qcompiler.dialects.coll import RANKS
from qcompiler.dialects.coll_tokens import (
    CUT,
    LAYOUT,
    as_bytes,
    cut_types,
    in_layout,
    is_cut,
    shaped,
    tokens_of,
    whole_type,
)
from qcompiler.distributed.communicator import Choices, current
from qcompiler.ir import Effects, Op, Size, Type
from qcompiler.ir.op_table import OpDef, OpError, declare


def gathered_types(op: Op) -> tuple[Type, ...]:
    """(x[1, share of b*s, n], experts[b*s, k], [b, s]) -> [b, s, n]"""
    if len(op.args) != 3:
        raise OpError("its arguments must be the tokens, their experts, and a list of sizes")
    whole = whole_type(op)
    _check_experts(op, tokens_of(whole.shape))
    return (whole,)


def scattered_types(op: Op) -> tuple[Type, ...]:
    """(x[b, s, n], experts[b*s, k]) -> [1, share of b*s, n]"""
    types = cut_types(op)
    _check_experts(op, tokens_of(op["x"].tensor.shape))
    return types


def _check_experts(op: Op, tokens: Size) -> None:
    kind, groups, ranks = op["experts"].tensor, op.attrs["groups"], op.attrs["ranks"]
    if len(kind.shape) != 2 or kind.dtype.is_float or kind.shape[0] != tokens:
        raise OpError(f"the experts are {kind}, but it needs a row of integers for each of {tokens} tokens", "experts")
    if isinstance(groups, int) and isinstance(ranks, int) and groups % ranks:
        raise OpError(f"{groups} groups cannot be divided among {ranks} ranks")


def gather_chosen_tokens(
    x: Tensor, experts: Tensor, sizes: Sequence[int], *, mesh: str, ranks: int, few: int, groups: int,
    scale_layout: str = "row_major",
) -> Tensor:  # fmt: skip
    """Torch definition of `coll.gather_chosen_tokens`: the tokens of all `ranks` that chose one of this rank's experts.

    Args:
        x: This rank's tokens.
        experts: The experts that each token of all ranks has chosen, `[tokens, chosen]`.
        sizes: All sizes of the result but the last; their product is the number of tokens.
        mesh: The axis of the mesh.
        ranks: The number of ranks along it, each with an equal number of experts.
        few: The number of tokens from which on they are cut.
        groups: The number of experts of all ranks.
        scale_layout: "col_major" for scales of activations whose format has this layout.
    """
    rows, count = x.reshape(-1, x.shape[-1]), prod(sizes)
    if is_cut(count, ranks, few):
        rows = current().gather_chosen(as_bytes(rows), mesh, Choices(experts, groups, ranks)).view(x.dtype)
    return in_layout(rows, scale_layout).view(*sizes, x.shape[-1])


def reduce_scatter_chosen_tokens(
    x: Tensor, experts: Tensor, *, mesh: str, ranks: int, few: int, groups: int
) -> Tensor:  # fmt: skip
    """Torch definition of `coll.reduce_scatter_chosen_tokens`: this rank's tokens of the sum over all `ranks`."""
    rows = x.reshape(-1, x.shape[-1])
    if not is_cut(len(rows), ranks, few):
        return shaped(current().all_reduce(x, mesh), x)
    return shaped(current().reduce_scatter_chosen(rows, mesh, Choices(experts, groups, ranks)), x)


CHOSEN = {**CUT, "groups": RANKS}

declare(
    OpDef(
        "coll.gather_chosen_tokens",
        "The tokens of all ranks that chose one of this rank's experts, and zeros for others, with the given sizes.",
        ("x", "experts", "*"),
        CHOSEN,
        {"scale_layout": LAYOUT},
        types=gathered_types,
        meaning=gather_chosen_tokens,
        effects=Effects.COMMUNICATES,
    )
)
declare(
    OpDef(
        "coll.reduce_scatter_chosen_tokens",
        "This rank's tokens of the sum over ranks; in a rank's term, tokens that chose none of its experts are zeros.",
        ("x", "experts"),
        CHOSEN,
        types=scattered_types,
        meaning=reduce_scatter_chosen_tokens,
        effects=Effects.COMMUNICATES,
    )
)
