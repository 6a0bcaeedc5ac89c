"""Layer patterns: the names that they match, precedence, and patterns without a match."""

import pytest
import torch

from passes.analyses.layers import EVERYTHING, check_patterns, names_of, why_not_selected
from qcompiler.errors import PassError
from qcompiler.ir import Graph
from qcompiler.runtime.weights import Weights

TEXT = """
func @m(%x: f32[4, 8]) -> (f32[4, 8], f32[4, 8]) {
  %w = core.param() {name = "layers.0.up.weight"} : f32[8, 8]
  %g = core.param() {name = "layers.0.smooth"} : f32[8]
  %v = core.param() {name = "head"} : f32[8, 8]
  %b = core.param() {name = "layers.0.up.bias"} : f32[8]
  %e = core.param() {name = "norm.weight"} : f32[8]
  %n = aten.mul.Tensor(%x, %e) : f32[4, 8]
  %s = aten.mul.Tensor(%w, %g) : f32[8, 8]
  %y = aten.linear(%n, %s, %b) : f32[4, 8]
  %z = aten.linear(%y, %v) : f32[4, 8]
  return %y, %z
}
"""


def graph() -> Graph:
    parsed = Graph.parse(TEXT)
    parsed.verify()
    return parsed


def test_names_are_those_of_all_constants_that_a_matmul_uses() -> None:
    found = graph()
    assert set(names_of(found["y"].op, found)) == {
        "layers.0.up.weight", "layers.0.up", "layers.0.smooth", "layers.0", "layers.0.up.bias",
    }  # fmt: skip
    assert set(names_of(found["z"].op, found)) == {"head"}  # %y is not a constant, and "head" has only one part


def test_tied_weights_match_by_all_of_their_names() -> None:
    found = graph()
    tensor = torch.zeros(8, 8)
    found.weights = Weights({"head": tensor, "embed.weight": tensor}, {
        "head": ("head", "embed.weight"), "embed.weight": ("head", "embed.weight"),
    })  # fmt: skip
    assert set(names_of(found["z"].op, found)) == {"head", "embed.weight", "embed"}
    assert why_not_selected(("*", "!embed"), found["z"].op, found) is not None
    check_patterns(("embed",), found)


@pytest.mark.parametrize(
    ("patterns", "reason"),
    [
        (("*",), None),
        (("layers.0.up",), None),
        (("layers.?.up.weight",), None),
        (("layers.[0-9].*",), None),
        (("*", "!head"), None),
        (("*", "!layers.*"), "the pattern '!layers.*' excludes it"),
        (("*", "!layers.*", "*.up"), None),
        (("*.up", "!*"), "the pattern '!*' excludes it"),
        (("!*", "*.up"), None),
        (("head",), "no pattern selects it: head"),
        (("*.Up", "LAYERS*"), "no pattern selects it: *.Up, LAYERS*"),
        ((), "no pattern selects it: "),
    ],
)
def test_the_last_matching_pattern_wins(patterns: tuple[str, ...], reason: str | None) -> None:
    found = graph()
    missed = why_not_selected(patterns, found["y"].op, found)
    assert (None if missed is None else str(missed)) == reason


@pytest.mark.parametrize(
    "patterns", [EVERYTHING, ("*", "!head"), ("layers.0.up", "!*"), (), ("*.smooth",), ("*", "!norm")]
)
def test_valid_patterns(patterns: tuple[str, ...]) -> None:
    check_patterns(patterns, graph())


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("*", "!haed"), "a pattern matches no matmul's weight: got 'haed'. Did you mean 'head'? Known: head, l"),
        (("layers.1.up",), "a pattern matches no matmul's weight: got 'layers.1.up'. Did you mean 'layers.0.up'?"),
        (("norm",), "a pattern matches no matmul's weight: got 'norm'."),  # a matmul does not use its weight
        (("zz", "aa"), "a pattern matches no matmul's weight: got 'aa'."),
    ],
)
def test_patterns_that_match_nothing(patterns: tuple[str, ...], message: str) -> None:
    with pytest.raises(PassError) as error:
        check_patterns(patterns, graph())
    assert str(error.value).startswith(message)
