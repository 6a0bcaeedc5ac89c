"""Collectives along the sequence, with labels that hold on numbers while two ranks run; each row has both cases."""

from functools import partial

import pytest
import torch
from sequence_cases import B_P_8, BLOCKS, GROUPS, ROUTED, TILES, case, check_refused
from token_lanes import wrong_values

from passes.analyses.sequence import Sequence, analyze
from passes.analyses.sequence_collectives import COLLECTIVES
from qcompiler.distributed.simulation import Simulation
from qcompiler.ir import Mesh

CHOSEN = '{few = 64, groups = 8, mesh = "tp", ranks = 2}'
TOP = "%best.0, %best.1 = aten.topk(%t, 2) : f32[s0*s1, 2], i64[s0*s1, 2]\n"
TURNED = (
    "%back = aten.transpose.int(%x, 0, 1) : f32[s1, s0, 8]\n%turned = aten.reshape(%back, [-1, 8]) : f32[s0*s1, 8]\n"
    "%best.0, %best.1 = aten.topk(%turned, 2) : f32[s0*s1, 2], i64[s0*s1, 2]\n"
)
CUT = '{few = 64, mesh = "tp", ranks = 2}'
PART = "[1, batch*positions, 8]"
LINEAR = '{few = 64, mesh = "tp", out_dtype = f32, ranks = 2, w_format = #fp8_block, x_format = #fp8_tile}'
OWN = '%own = coll.own_first(%expert) {groups = 8, mesh = "tp", ranks = 2} : i64[2*s0*s1]\n'
LEGAL = {
    "coll.all_reduce": ('%r = coll.all_reduce(%x) {mesh = "tp"} : f32[s0, s1, 8]', B_P_8),
    "coll.all_gather": (
        '%r = coll.all_gather(%x) {axis = 2, mesh = "tp", ranks = 2} : f32[s0, s1, 16]', "[batch, positions, 16]",
    ),
    "coll.fused_reduce_quantize": (
        '%r, %z = coll.fused_reduce_quantize(%x) {expression = "x0 * rsqrt(mean(x0 * x0) + 1.0)", format = #fp8_tile, '
        'keep = [], mesh = "tp", summed = 0} : f8e4m3fn[s0, s1, 8], f32[s0, s1, 1]', B_P_8,
    ),
    "coll.own_tokens": (f"%r = coll.own_tokens(%x) {CUT} : f32[1, share(s0*s1, 2, 64), 8]", PART),
    "coll.reduce_scatter_tokens": (f"%r = coll.reduce_scatter_tokens(%x) {CUT} : f32[1, share(s0*s1, 2, 64), 8]", PART),
    "coll.linear_scatter_tokens": (
        f"{TILES}{BLOCKS}  %r = coll.linear_scatter_tokens(%q, %s, %wq, %ws) {LINEAR} "
        ": f32[1, share(s0*s1, 2, 64), 8]", PART,
    ),
    "coll.all_to_all_tokens": (
        f"%r = coll.all_to_all_tokens(%x) {CUT} : f32[2, 1, share(s0*s1, 2, 64), 8]", "[2, 1, batch*positions, 8]",
    ),
    "coll.all_gather_tokens": (
        f"%u = coll.own_tokens(%x) {CUT} : f32[1, share(s0*s1, 2, 64), 8]\n"
        "%rows = aten.view(%u, [-1, 2, 4]) : f32[share(s0*s1, 2, 64), 2, 4]\n"
        "%own = aten.view(%rows, [1, -1, 8]) : f32[1, share(s0*s1, 2, 64), 8]\n"
        f"%r = coll.all_gather_tokens(%own, [%n0, %n1]) {CUT} : f32[s0, s1, 8]", B_P_8,
    ),
    "coll.gather_chosen_tokens": (
        f"{TOP}%own = coll.own_tokens(%t) {CUT} : f32[share(s0*s1, 2, 64), 8]\n"
        f"%r = coll.gather_chosen_tokens(%own, %best.1, [%nt]) {CHOSEN} : f32[s0*s1, 8]", "[batch*positions, 8]",
    ),
    "coll.reduce_scatter_chosen_tokens": (
        f"{TOP}%r = coll.reduce_scatter_chosen_tokens(%x, %best.1) {CHOSEN} : f32[1, share(s0*s1, 2, 64), 8]", PART,
    ),
    "coll.own_first": (
        ROUTED.replace("%key, %order = aten.sort(%expert)", f"{OWN}  %key, %order = aten.sort(%own)") + GROUPS
        + "%first = aten.slice.Tensor(%ends, 0, 0, 4) : i32[4]\n"
        "%half = aten.slice.Tensor(%experts, 0, 0, 4) : f32[4, 8, 8]\n"
        "%z = aten._grouped_mm(%sorted, %half, %first) : f32[2*s0*s1, 8]\n"
        "%r = coll.own_rows(%z, %first) : f32[2*s0*s1, 8]", "[sorted, 8]",
    ),
}  # fmt: skip
ILLEGAL = {
    "coll.all_reduce": (
        ROUTED + '%r = coll.all_reduce(%order) {mesh = "tp"} : i64[2*s0*s1]', "is the order of all tokens",
    ),
    "coll.all_gather": (
        '%r = coll.all_gather(%x) {axis = 1, mesh = "tp", ranks = 2} : f32[s0, 2*s1, 8]',
        "coll.all_gather concatenates along the positions",
    ),
    "coll.fused_reduce_quantize": (
        '%r, %z = coll.fused_reduce_quantize(%x) {expression = "relu(x0)", format = #fp8_tensor, keep = [], '
        'mesh = "tp", summed = 0} : f8e4m3fn[s0, s1, 8], f32[1, 1]', "computed from all tokens",
    ),
    "coll.own_tokens": (ROUTED + f"%r = coll.own_tokens(%order) {CUT} : i64[2*s0*s1]", "is the order of all tokens"),
    "coll.reduce_scatter_tokens": (
        ROUTED + f"%r = coll.reduce_scatter_tokens(%order) {CUT} : i64[2*s0*s1]", "is the order of all tokens",
    ),
    "coll.linear_scatter_tokens": (
        f"{TILES}%r = coll.linear_scatter_tokens(%q, %s, %q, %s) {LINEAR} : f32[1, share(s0*s1, 2, 64), 8]",
        "the operand 'w' of coll.linear_scatter_tokens depends on the tokens",
    ),
    "coll.all_to_all_tokens": (
        ROUTED + f"%u = aten.view(%order, [%n2, 1]) : i64[2*s0*s1, 1]\n"
        f"%r = coll.all_to_all_tokens(%u) {CUT} : i64[2, share(2*s0*s1, 2, 64), 1]", "is the order of all tokens",
    ),
    "coll.all_gather_tokens": (
        f"%u = coll.own_tokens(%x) {CUT} : f32[1, share(s0*s1, 2, 64), 8]\n"
        f"%r = coll.all_gather_tokens(%u, [%n1, %n0]) {CUT} : f32[s1, s0, 8]", "mixes tokens",
    ),
    "coll.gather_chosen_tokens": (
        f"{TURNED}%own = coll.own_tokens(%t) {CUT} : f32[share(s0*s1, 2, 64), 8]\n"
        f"%r = coll.gather_chosen_tokens(%own, %best.1, [%nt]) {CHOSEN} : f32[s0*s1, 8]", "the experts of other tokens",
    ),
    "coll.reduce_scatter_chosen_tokens": (
        f"{TURNED}%r = coll.reduce_scatter_chosen_tokens(%x, %best.1) {CHOSEN} : f32[1, share(s0*s1, 2, 64), 8]",
        "the experts of other tokens",
    ),
    "coll.own_first": (
        ROUTED + '%r = coll.own_first(%order) {groups = 8, mesh = "tp", ranks = 2} : i64[2*s0*s1]',
        "is the order of all tokens",
    ),
}  # fmt: skip

ROUTED_BY_PARTS = (
    f"%own_t = coll.own_tokens(%t) {CUT} : f32[share(s0*s1, 2, 64), 8]\n"
    "%top.0, %top.1 = aten.topk(%own_t, 2) : f32[share(s0*s1, 2, 64), 2], i64[share(s0*s1, 2, 64), 2]\n"
    f"%best.1 = coll.all_gather_tokens(%top.1, [%nt]) {CUT} : i64[s0*s1, 2]"
)
"""The choices of a router on a rank's own tokens."""

UNDEFINED = {"%z [sorted, 8]"}
"""Torch leaves the rows after the last group of a rank as they are in memory; `coll.own_rows` makes them zeros."""


@pytest.mark.parametrize("name", LEGAL)
def test_a_position_wise_collective_has_a_label(name: str) -> None:
    body, label = LEGAL[name]
    graph = case(body)
    found = analyze(graph)
    assert isinstance(found, Sequence), found
    assert str(found.labels[graph["r"]]) == label
    ids = torch.randint(0, 64, (2, 5))
    check = partial(wrong_values, graph, found, ids, 1, 2, causal=False)
    for wrong in Simulation(Mesh.parse("tp=2")).run([check, check]):
        assert {*wrong} <= UNDEFINED


def test_groups_of_gathered_choices() -> None:
    """They are numbers of groups, so that counts of them are the groups of a matmul."""
    routed = ROUTED.replace("%best.0, %best.1 = aten.topk(%t, 2) : f32[s0*s1, 2], i64[s0*s1, 2]", ROUTED_BY_PARTS)
    found = analyze(case(routed + GROUPS + "%r = aten._grouped_mm(%sorted, %experts, %ends) : f32[2*s0*s1, 8]"))
    assert isinstance(found, Sequence), found


@pytest.mark.parametrize("name", ILLEGAL)
def test_a_collective_that_mixes_tokens_is_refused(name: str) -> None:
    check_refused(*ILLEGAL[name])


def test_every_row_has_both_cases() -> None:
    assert {*COLLECTIVES} == {*LEGAL} == {*ILLEGAL}
