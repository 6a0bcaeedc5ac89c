"""The recognizer of causal masks: forms that it proves, compared with the mask, and forms that it refuses."""

import pytest
import torch

from passes.analyses.causal_masks import CausalMask, Mask, NotCausal, causal_mask
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph

HEAD = """
func @m(%q: i64[2, s0], %pad: i64[2, s0], %keep: b8[2, 1, 1, s0]) -> () where s0 in 1.. {
  %n = aten.sym_size.int(%q, 1) : int(s0)
  %k = aten.arange(%n) : i64[s0]
  %i = aten.unsqueeze(%k, 1) : i64[s0, 1]
  %lt = aten.lt.Tensor(%i, %k) : b8[s0, s0]
  %le = aten.le.Tensor(%k, %i) : b8[s0, s0]
  %d = aten.sub.Tensor(%i, %k) : i64[s0, s0]
  %near = aten.lt.Scalar(%d, 3) : b8[s0, s0]
  %ones = aten.ones([%n, %n]) {dtype = b8} : b8[s0, s0]
"""
M = "b8[s0, s0]"

CAUSAL: dict[str, tuple[str, CausalMask]] = {
    "key <= query": (f"%r = aten.alias(%le) : {M}", CausalMask()),
    "not query < key": (f"%r = aten.logical_not(%lt) : {M}", CausalMask()),
    "distance > -1": (f"%r = aten.gt.Scalar(%d, -1) : {M}", CausalMask()),
    "a triangle of ones": (f"%r = aten.tril(%ones) : {M}", CausalMask()),
    "2 * query + 1 > 2 * key": (
        "%a = aten.mul.Scalar(%i, 2) : i64[s0, 1]\n%b = aten.add.Scalar(%a, 1) : i64[s0, 1]\n"
        f"%c = aten.mul.Scalar(%k, 2) : i64[s0]\n%r = aten.gt.Tensor(%b, %c) : {M}",
        CausalMask(),
    ),
    "before or the same": (
        f"%a = aten.gt.Scalar(%d, 0) : {M}\n%b = aten.eq.Scalar(%d, 0) : {M}\n%r = aten.logical_or(%a, %b) : {M}",
        CausalMask(),
    ),
    "a window": (f"%r = aten.bitwise_and.Tensor(%near, %le) : {M}", CausalMask(window=3)),
    "two windows": (
        f"%a = aten.le.Scalar(%d, 4) : {M}\n%b = aten.logical_and(%a, %le) : {M}\n"
        f"%r = aten.logical_and(%near, %b) : {M}",
        CausalMask(window=3),
    ),
    "a square, which is a window": (
        f"%a = aten.mul.Tensor(%ones, %le) : {M}\n%b = aten.triu(%ones, -2) : {M}\n%r = aten.mul.Tensor(%a, %b) : {M}",
        CausalMask(window=3),
    ),
    "chunks": (
        "%a = aten.floor_divide(%i, 4) : i64[s0, 1]\n%b = aten.floor_divide(%k, 4) : i64[s0]\n"
        f"%c = aten.eq.Tensor(%a, %b) : {M}\n%r = aten.logical_and(%c, %le) : {M}",
        CausalMask(chunk=4),
    ),
    "addends of half precision": (
        "%r = aten.where.Scalar(%le, 0.0, -65504.0) : f32[s0, s0]",
        CausalMask(),
    ),
}

REFUSED: dict[str, tuple[str, str]] = {
    "everything": (f"%r = aten.alias(%ones) : {M}", "its mask hides nothing"),
    "only past keys": (f"%r = aten.gt.Scalar(%d, 0) : {M}", "hides keys before the query"),
    "one key too many": (f"%r = aten.ge.Scalar(%d, -1) : {M}", "shows keys after the query"),
    "a distant band": (
        f"%a = aten.ge.Scalar(%d, 2) : {M}\n%r = aten.logical_and(%a, %le) : {M}",
        "hides keys before the query",
    ),
    "every second key": (
        f"%a = aten.remainder.Scalar(%d, 2) : i64[s0, s0]\n%b = aten.eq.Scalar(%a, 0) : {M}\n"
        f"%r = aten.logical_and(%b, %le) : {M}",
        "hides keys before the query",
    ),
    "a window around": (
        f"%a = aten.gt.Scalar(%d, -3) : {M}\n%r = aten.logical_and(%a, %near) : {M}",
        "after the query",
    ),
    "a mild addend": ("%r = aten.where.Scalar(%le, 0.0, -100.0) : f32[s0, s0]", "neither keeps a key"),
    "a bias of 1": ("%r = aten.where.Scalar(%le, 1.0, -inf) : f32[s0, s0]", "neither keeps a key"),
    "distances": ("%r = aten._to_copy(%d) {dtype = f32} : f32[s0, s0]", "its mask hides nothing"),
}


def recognized(text: str, *, inverted: bool = False) -> tuple[Graph, CausalMask | NotCausal]:
    kind = text.rpartition(" : ")[2]
    graph = Graph.parse(HEAD.replace("-> ()", f"-> ({kind})") + text + "\n  return %r\n}\n")
    length = graph.inputs[0].tensor.shape[1]
    return graph, causal_mask(graph, [Mask(graph["r"], inverted)], (2, 4, length, length))


@pytest.mark.parametrize("what", CAUSAL)
def test_a_form_is_proven_and_equals_the_mask(what: str) -> None:
    text, want = CAUSAL[what]
    graph, found = recognized(text)
    assert found == want
    for length in (1, 3, 9):
        nothing = torch.zeros(2, length, dtype=torch.int64)
        (mask,) = interpret(graph, [nothing, nothing, torch.zeros(2, 1, 1, length, dtype=torch.bool)])
        seen = mask if mask.dtype is torch.bool else mask == 0
        query, key = torch.arange(length)[:, None], torch.arange(length)
        expected = (key <= query) & (query - key < (want.window or length))
        assert torch.equal(seen, expected & (query // (want.chunk or length) == key // (want.chunk or length)))


@pytest.mark.parametrize("what", REFUSED)
def test_other_masks_are_refused_with_the_reason(what: str) -> None:
    text, why = REFUSED[what]
    _, found = recognized(text)
    assert isinstance(found, NotCausal) and why in found.why


def test_a_mask_may_say_what_is_hidden() -> None:
    assert recognized(f"%r = aten.alias(%lt) : {M}", inverted=True)[1] == CausalMask()
    assert isinstance(recognized(f"%r = aten.alias(%le) : {M}", inverted=True)[1], NotCausal)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("keep", "%r = aten.logical_and(%le, %keep) : b8[2, 1, s0, s0]"),
        (
            "pad",
            "%a = aten.view(%pad, [2, 1, 1, -1]) : i64[2, 1, 1, s0]\n%b = aten.ne.Scalar(%a, 0) : b8[2, 1, 1, s0]\n"
            "%r = aten.logical_and(%b, %le) : b8[2, 1, s0, s0]",
        ),
    ],
)
def test_padding_is_named(name: str, text: str) -> None:
    graph, found = recognized(text)
    assert found == CausalMask(padding=(graph[name],))


def test_a_window_as_long_as_the_sequence_is_none() -> None:
    text = HEAD.replace("s0", "3").replace(" where 3 in 1..", "")
    lines = text.replace("-> ()", "-> (b8[3, 3])") + "%r = aten.logical_and(%near, %le) : b8[3, 3]\n  return %r\n}\n"
    graph = Graph.parse(lines)
    assert causal_mask(graph, [Mask(graph["r"])], (2, 4, 3, 3)) == CausalMask()


def test_positions_of_an_input_are_causal_only_if_promised() -> None:
    text = (
        "%a = aten.view(%q, [2, 1, -1, 1]) : i64[2, 1, s0, 1]\n%b = aten.view(%q, [2, 1, 1, -1]) : i64[2, 1, 1, s0]\n"
    )
    graph, found = recognized(text + "%r = aten.ge.Tensor(%a, %b) : b8[2, 1, s0, s0]")
    assert isinstance(found, NotCausal) and found.value is graph["q"] and "consecutive=q" in found.why
    length = graph["q"].tensor.shape[1]
    promised = causal_mask(graph, [Mask(graph["r"])], (2, 4, length, length), [graph["q"]])
    assert promised == CausalMask(assumed=(graph["q"],))
