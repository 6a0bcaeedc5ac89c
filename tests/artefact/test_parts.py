"""The parts of artefacts on their own: JSON, literals, and structures of arguments."""

import json
import math
from collections import OrderedDict, defaultdict, deque
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from qcompiler import ArtefactError
from qcompiler.artefact.literals import from_json, is_exact, to_json
from qcompiler.artefact.strict_json import Node, parse, render
from qcompiler.artefact.structures import structure_from_json, structure_to_json

FILE = Path("file.json")


class Point(NamedTuple):
    x: Any
    y: Any


class Color(Enum):
    RED = 1


class Box:
    """A container class of the user."""

    def __init__(self, inside: list[Any]) -> None:
        self.inside = inside


class Lid:
    """A container whose context is not a number."""

    def __init__(self, color: Color) -> None:
        self.color = color


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5), st.complex_numbers(),
    st.sampled_from([torch.bfloat16, torch.float8_e4m3fn, torch.device("cpu"), torch.device("cuda", 1)]),
)  # fmt: skip
keys = st.one_of(st.text(max_size=3), st.integers(-5, 5), st.booleans(), st.tuples(st.integers(0, 3)))
literals = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(keys, inner, max_size=3), max_leaves=8,
)  # fmt: skip
trees = st.recursive(
    st.just(0),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3).map(OrderedDict), st.tuples(inner, inner).map(lambda p: Point(*p)),
        st.dictionaries(keys, inner, max_size=3).map(lambda items: defaultdict(list, items)),
        st.lists(inner, max_size=3).map(lambda items: deque(items, maxlen=4)),
    ),
    max_leaves=10,
)  # fmt: skip


def through_text(value: Any) -> Node:
    return parse(render(value).encode(), FILE)


@given(literals)
def test_literals_go_there_and_back(value: Any) -> None:
    back = from_json(through_text(to_json(value)))
    assert repr(back) == repr(value) and type(back) is type(value)
    assert is_exact(value)


def test_what_is_no_literal_is_shown() -> None:
    back = from_json(through_text(to_json([Color.RED, 1])))
    assert repr(back) == "[<Color.RED: 1>, 1]" and back[0] != Color.RED
    assert not is_exact(Color.RED) and not is_exact((1, [Color.RED])) and not is_exact({"a": Color.RED})


@given(trees)
def test_structures_go_there_and_back(tree: Any) -> None:
    leaves, spec = pytree.tree_flatten(tree)
    back = structure_from_json(through_text(structure_to_json(spec)))
    assert back == spec
    assert repr(pytree.tree_unflatten(leaves, back)) == repr(tree)


def test_a_registered_class() -> None:
    pytree.register_pytree_node(
        Box, lambda box: (box.inside, len(box.inside)), lambda children, _: Box(list(children)),
        to_dumpable_context=lambda count: {"count": count}, from_dumpable_context=lambda context: context["count"],
        serialized_type_name="Box",
    )  # fmt: skip
    spec = pytree.tree_structure({"box": Box([1, Box([])])})
    assert structure_from_json(through_text(structure_to_json(spec))) == spec


def test_what_no_text_can_say() -> None:
    with pytest.raises(ArtefactError, match=r"a dict with such a key cannot be saved: got <Color\.RED: 1>"):
        structure_to_json(pytree.tree_structure({Color.RED: 1}))
    with pytest.raises(ArtefactError, match="a defaultdict cannot be saved: got its factory"):
        structure_to_json(pytree.tree_structure(defaultdict(lambda: 1, a=1)))
    pytree.register_pytree_node(
        Lid, lambda lid: ([], lid.color), lambda _, color: Lid(color), serialized_type_name="Lid"
    )
    with pytest.raises(ArtefactError, match=r"a structure that cannot be saved: got .*:Lid with <Color\.RED: 1>"):
        structure_to_json(pytree.tree_structure([Lid(Color.RED)]))


def test_a_class_that_transformers_does_not_have() -> None:
    structure: dict[str, Any] = {
        "class": {"name": "transformers.models.none.modeling_none:X", "context": None, "children": []}
    }
    with pytest.raises(ArtefactError, match=r'Install a transformers that has it: pip install "qcompiler\[hf\]"'):
        structure_from_json(Node(structure, "results", FILE))


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20,
))  # fmt: skip
def test_json_goes_there_and_back(value: Any) -> None:
    assert parse(render(value).encode(), FILE).value == value


@pytest.mark.parametrize(
    ("value", "read", "need"),
    [
        (1, Node.text, "a string"), (True, Node.count, "an integer"), (-1, Node.count, "an integer"),
        (1.5, Node.count, "an integer"), ("x", Node.number, "a number"), (math.inf, Node.number, "a number"),
        (1, Node.flag, "true or false"), ({}, Node.items, "a list"), ([], Node.members, "an object"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(value: Any, read: Any, need: str) -> None:
    node = Node({"outer": {"inner": value}}, "", FILE)["outer"]["inner"]
    with pytest.raises(
        ArtefactError, match=rf"the artefact has a wrong value: got .*; need {need}.*file\.json, outer\.inner"
    ):
        read(node)
    with pytest.raises(ArtefactError, match="need a member 'other'"):
        Node({"outer": {}}, "", FILE)["outer"]["other"]
    assert json.loads(render({"a": 1})) == {"a": 1}
