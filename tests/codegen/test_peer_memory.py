"""Which ranks exchange tensors through each other's memory; between two GPUs: `tests/compiler/test_sharded_gpu.py`."""

import pytest

from codegen.peer_memory import Seat, can_connect


@pytest.mark.parametrize(
    ("ranks", "connects"),
    [
        ([Seat("a", 0, True), Seat("a", 1, True), Seat("a", 2, True)], True),
        ([Seat("a", 0, True), Seat("b", 1, True)], False),
        ([Seat("a", 0, True), Seat("a", 1, False)], False),
        ([Seat("a", 0, True), Seat("a", 0, True)], False),  # each process sees one GPU
    ],
)
def test_which_ranks_connect(ranks: list[Seat], connects: bool) -> None:
    assert can_connect(ranks) is connects
