"""Graphs as DOT: modules are clusters, and whatever names are made of, the text says them."""

import json
import shutil
import subprocess
from collections import Counter
from xml.etree import ElementTree

import pytest

import qcompiler.dialects  # noqa: F401
from qcompiler.ir import Graph, Location
from qcompiler.testing import random_graph

TEXT = """\
func @mlp(%x: bf16[4, 8]) -> (bf16[4, 8]) {
  %w = core.param() {name = "w"} : bf16[8, 8]
  %q, %s = quant.quantize(%x) {format = #format<i8, block = [1, 8]>} : i8[4, 8], f32[4, 1] loc(in "h.0")
  %d = quant.dequantize(%q, %s) {format = #format<i8, block = [1, 8]>, out_dtype = bf16} : bf16[4, 8] loc(in "h.0")
  %y = aten.mul.Tensor(%d, %d) : bf16[4, 8] loc(in "h")
  %z = aten.linear(%y, %w) : bf16[4, 8]
  return %z
}"""

DOT = """\
digraph "mlp" {
  rankdir = TB
  node [shape = box, style = "rounded, filled", fillcolor = white, fontname = "monospace", fontsize = 10]
  edge [color = "#808890", fontname = "monospace", fontsize = 8]
  n0 [label = "core.input\\n%x: bf16[4, 8]", shape = ellipse, fillcolor = "#f2f3f4"]
  n1 [label = "core.param\\n%w: bf16[8, 8]", shape = ellipse, fillcolor = "#f2f3f4"]
  n5 [label = "aten.linear\\n%z: bf16[4, 8]"]
  n6 [label = "core.return", shape = ellipse, fillcolor = "#f2f3f4"]
  subgraph "cluster_h" {
    label = "h"; labeljust = l; color = "#c0c6cc"; fontname = "monospace"; fontsize = 10
    n4 [label = "aten.mul.Tensor\\n%y: bf16[4, 8]"]
    subgraph "cluster_h.0" {
      label = "0"; labeljust = l; color = "#c0c6cc"; fontname = "monospace"; fontsize = 10
      n2 [label = "quant.quantize\\n%q: i8[4, 8]\\n%s: f32[4, 1]", fillcolor = "#ede7f9"]
      n3 [label = "quant.dequantize\\n%d: bf16[4, 8]", fillcolor = "#ede7f9"]
    }
  }
  n0 -> n2
  n2 -> n3 [label = "%q"]
  n2 -> n3 [label = "%s"]
  n3 -> n4
  n4 -> n5
  n1 -> n5
  n5 -> n6
}"""

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="needs Graphviz's dot")


def drawn(text: str) -> tuple[dict[str, int], set[str]]:
    """What dot draws of a text: how many there are of each class, and everything that is written on it."""
    svg = subprocess.run(["dot", "-Tsvg"], input=text, capture_output=True, encoding="utf-8", check=True).stdout
    parts = list(ElementTree.fromstring(svg).iter())
    return Counter(part.get("class", "") for part in parts), {part.text or "" for part in parts}


def test_modules_are_clusters() -> None:
    assert Graph.parse(TEXT).to_dot() == DOT


def test_weights_can_be_left_out() -> None:
    text = Graph.parse(TEXT).to_dot(weights=False)
    assert "core.param" not in text
    assert text.count("->") == 6


@needs_dot
@pytest.mark.parametrize("seed", range(10))
def test_dot_draws_random_graphs(seed: int) -> None:
    graph = random_graph(seed)
    counts, _ = drawn(graph.to_dot())
    assert counts["node"] == len(graph)


NAMES = ['a"b', "a\\", "a\\nb", "<b>", "{|}", "a.b.c", "ünï 漢字", "\\N", "]; n0 -> n1 ["]


@needs_dot
@pytest.mark.parametrize("module", NAMES)
def test_any_name_of_a_module_is_drawn_as_it_is(module: str) -> None:
    graph = Graph.parse(TEXT.replace('"h.0"', json.dumps(module, ensure_ascii=False)))
    counts, texts = drawn(graph.to_dot())
    assert counts["cluster"] == 1 + len(module.split("."))
    assert counts["node"] == len(graph)
    assert module.split(".")[-1] in texts


def test_what_cannot_be_seen_is_spelled_out() -> None:
    graph = Graph("f")
    graph.return_op.loc = Location(module="a\x00\ud800")
    assert r'label = "a\\x00\\ud800"' in graph.to_dot()
