"""What a rank needs of the tokens of others for its own experts, and what it returns to them.

    %chosen = coll.all_gather_tokens(…) : i64[s0, 2]                     the experts of each token
    %own = coll.own_first(%e) {groups = 8, …}                            %e: the elements of %chosen
    %key, %order = aten.sort(%own)
    %token = aten.floor_divide(%order, 2)
    %v = coll.all_gather_tokens(…) : bf16[s0, 512]                       read by the next line only
    %x = aten.index.Tensor(%v, [%token])                                 rows sorted by expert
    …                                                                    matmuls of this rank's experts
    %sum = aten.sum.dim_IntList(%entries, [1]) : bf16[s0, 512]           terms of a sum over ranks
    %r = coll.reduce_scatter_tokens(%sum)

In a mixture that `expert-parallel` has divided, rows after the entries of a rank's own experts are never read, and
their terms are zeros (`passes.analyses.expert_regions`). The entries of token t are rows 2 t and 2 t + 1, in the order
of %chosen. So a rank needs only the tokens that chose one of its experts, and its terms of all others are zeros.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from math import comb

from passes.analyses.expert_regions import OWN_FIRST, SIZES, ExpertRegion, Tag, index_of, keeps_rows
from passes.analyses.token_regions import RECOUNTING, is_recount
from qcompiler.dialects.coll_tokens import tokens_of
from qcompiler.ir import Graph, Missed, Op, Role, Size, Value

GATHER, SCATTER = "coll.all_gather_tokens", "coll.reduce_scatter_tokens"
GATHER_CHOSEN, SCATTER_CHOSEN = "coll.gather_chosen_tokens", "coll.reduce_scatter_chosen_tokens"


class Rows(Enum):
    """What the first axis of a term counts."""

    ENTRIES = "the entries of the tokens, in the order of their choices"
    TOKENS = "the tokens"
    COUNTED = "the tokens, with all axes but the last one"


@dataclass
class ChosenTokens:
    """What ranks exchange for a mixture whose experts they have divided.

    Attributes:
        region: The mixture.
        choices: The experts that each token has chosen, `[tokens, chosen]`.
        groups: The number of experts of all ranks.
        gathers: Gathers of tokens of which a rank needs only the tokens that chose one of its experts.
        scatters: Sums of terms that are zeros for all other tokens.
        missed: Other gathers, and other terms, with the reasons.
    """

    region: ExpertRegion
    choices: Value
    groups: int
    gathers: list[Op] = field(default_factory=list)
    scatters: list[Op] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)

    @property
    def tokens(self) -> Size:
        """The number of tokens."""
        return self.choices.tensor.shape[0]

    @property
    def chosen(self) -> int:
        """The number of experts that a token chooses."""
        return int(str(self.choices.tensor.shape[1]))


def share_sent(groups: int, chosen: int, ranks: int) -> float:
    """The expected part of the tokens that a rank sends to another one, if all choices are equally likely."""
    return 1 - comb(groups - groups // ranks, chosen) / comb(groups, chosen)


def chosen_tokens(graph: Graph, region: ExpertRegion, mesh: str) -> ChosenTokens | Missed:
    """What ranks exchange for the experts of a region; why it is not known."""
    own = region.sort["self"].op
    if own.name != OWN_FIRST or own.attrs["mesh"] != mesh:
        return Missed("its experts are not divided", region.matmuls[0].results[0])
    choices = own["x"]
    while len(choices.tensor.shape) != 2 and (choices.op.role is Role.CAST or choices.op.name in RECOUNTING):
        choices = choices.op["self"]
    if len(choices.tensor.shape) != 2 or not isinstance(choices.tensor.shape[1], int):
        return Missed("the experts of each token are not in one row of a matrix", own["x"])
    found = ChosenTokens(region, choices, int(str(own.attrs["groups"])))
    tokens = [op for op in graph.ops() if op.results and region.tags.get(op.results[0]) is Tag.TOKEN]
    odd = [op for op in tokens if op.role is not Role.CAST and op.argument("other") != found.chosen]
    if odd:
        return Missed(f"they are not the tokens of {found.chosen} entries each", odd[0].result)
    found.gathers = [op for op in _tables(graph, found) if _is_needed_only(graph, op, found)]
    rows = _rows_of_terms(found)
    for term in region.sums:
        readers = [user for user in graph.users(term) if _first(user) not in region.tags]
        if all(user.name == SCATTER_CHOSEN for user in readers):
            continue
        if rows.get(term, Rows.ENTRIES) is Rows.ENTRIES or tokens_of(term.tensor.shape) != found.tokens:
            found.missed.append(Missed("its rows are not known to be the sums of the entries of a token", term))
        elif all(user.name == SCATTER and user.attrs["mesh"] == mesh for user in readers):
            found.scatters += readers
        else:
            found.missed.append(Missed("all tokens of the sum are on each rank: put sp after ep", term))
    return found


def _first(op: Op) -> Value | None:
    return op.results[0] if op.results else None


def _tables(graph: Graph, found: ChosenTokens) -> Iterator[Op]:
    """The gathers of tokens whose rows are sorted by expert; notes why a table of rows is not such a gather."""
    tables = dict.fromkeys(op["self"] for op in graph.ops("aten.index.Tensor") if _by_token(op, found))
    for table in tables:
        source = table
        while source.op.name in RECOUNTING:
            source = source.op["self"]
        if source.op.name == GATHER_CHOSEN:
            continue
        if source.op.name != GATHER:
            found.missed.append(Missed("each rank holds all tokens: put sp after ep", table))
        elif table is not source:
            others = [user for value in (source, table) for user in graph.users(value)]
            odd = [user.name for user in others if not (user.name in (*RECOUNTING, *SIZES) or _by_token(user, found))]
            why = f"{odd[0]} reads all tokens, too" if odd else "the gathered tokens are read through a view"
            found.missed.append(Missed(why, source))
        else:
            yield source.op


def _by_token(op: Op, found: ChosenTokens) -> bool:
    """Whether an operation looks up a row of a matrix for the token of each entry in sorted order."""
    index, table = index_of(op) if op.name == "aten.index.Tensor" else None, op.args[0] if op.args else None
    if index is None or not isinstance(table, Value) or table in found.region.tags or len(table.tensor.shape) != 2:
        return False
    if table.tensor.shape[0] != found.tokens:
        return False
    held = found.region.tags.get(index)
    return held is Tag.TOKEN or (held is Tag.ORDER and found.chosen == 1)


def _is_needed_only(graph: Graph, gather: Op, found: ChosenTokens) -> bool:
    """Whether only rows of this rank's entries are read of gathered tokens; else notes why not."""
    for user in graph.users(gather.result):
        late = graph.rank(user) > graph.rank(found.choices.op)
        if not _by_token(user, found) and not (user.name in SIZES and late):
            found.missed.append(Missed(f"{user.name} reads all tokens, too", gather.result))
            return False
    for op in found.region.returns:
        rows = op["source"] if op.name == "aten.index_add" else op["self"]
        if found.region.tags.get(rows) is not Tag.OWN:
            found.missed.append(Missed("rows of other experts are read", rows))
            return False
    return True


def _rows_of_terms(found: ChosenTokens) -> dict[Value, Rows]:
    """What the first axis of each term counts, where it is known."""
    known: dict[Value, Rows] = {}
    for value, tag in found.region.tags.items():
        if tag is Tag.TERM and (rows := _rows_of(value, known, found)) is not None:
            known[value] = rows
    return known


def _rows_of(value: Value, known: dict[Value, Rows], found: ChosenTokens) -> Rows | None:
    op, shape = value.op, value.tensor.shape
    if op in found.region.returns:
        if op.name == "aten.index.Tensor":
            return Rows.ENTRIES
        index = found.region.tags.get(op["index"])
        return Rows.TOKENS if index is Tag.TOKEN or found.chosen == 1 else Rows.ENTRIES
    read = {operand for _, operand in op.operands() if found.region.tags.get(operand) is Tag.TERM}
    held = {known.get(operand) for operand in read}
    if len(held) != 1 or (rows := held.pop()) is None:
        return None
    if rows is Rows.ENTRIES and op.role is Role.VIEW:
        old = op.args[0].tensor.shape if isinstance(op.args[0], Value) else ()
        if shape == (*found.choices.tensor.shape, *old[1:]):
            return Rows.TOKENS
    if rows is not Rows.ENTRIES and is_recount(op):
        return Rows.COUNTED if tokens_of(shape) == found.tokens else None
    if rows is Rows.COUNTED:
        return rows if op.role is Role.CAST else None
    return rows if keeps_rows(op, read) else None
