"""Collectives along the sequence, with labels that hold on numbers while two ranks run; each row has both cases."""

from functools import partial

import pytest
import torch
from sequence_cases import B_P_8, ROUTED, case, check_refused
from token_lanes import wrong_values

from passes.analyses.sequence import Sequence, analyze
from passes.analyses.sequence_collectives import COLLECTIVES
from qcompiler.distributed.simulation import Simulation
from qcompiler.ir import Mesh

LEGAL = {
    "coll.all_reduce": ('%r = coll.all_reduce(%x) {mesh = "tp"} : f32[s0, s1, 8]', B_P_8),
    "coll.all_gather": (
        '%r = coll.all_gather(%x) {axis = 2, mesh = "tp", ranks = 2} : f32[s0, s1, 16]', "[batch, positions, 16]",
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
}  # fmt: skip


@pytest.mark.parametrize("name", LEGAL)
def test_a_position_wise_collective_has_a_label(name: str) -> None:
    body, label = LEGAL[name]
    graph = case(body)
    found = analyze(graph)
    assert isinstance(found, Sequence), found
    assert str(found.labels[graph["r"]]) == label
    ids = torch.randint(0, 64, (2, 5))
    check = partial(wrong_values, graph, found, ids, 1, 2, causal=False)
    assert Simulation(Mesh.parse("tp=2")).run([check, check]) == [[], []]


@pytest.mark.parametrize("name", ILLEGAL)
def test_a_collective_that_mixes_tokens_is_refused(name: str) -> None:
    check_refused(*ILLEGAL[name])


def test_every_row_has_both_cases() -> None:
    assert {*COLLECTIVES} == {*LEGAL} == {*ILLEGAL}
