"""The report: a reason for everything that is not quantized, and bytes that add up."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler.ir import Graph
from qcompiler.pass_manager.pipeline import Pass, Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.report.report import Report, build_report
from qcompiler.schemes.named import pipeline

MIXED = """
func @g(%ids: i64[s0], %x: bf16[s0, 128]) -> (bf16[s0, 64], f32[s0, 64], bf16[s0, 300]) {
  %table = core.param() {name = "table"} : bf16[300, 128]
  %gain = core.param() {name = "gain"} : bf16[128]
  %w = core.param() {name = "w"} : bf16[64, 128]
  %w2 = core.param() {name = "w2"} : bf16[64, 128]
  %w3 = core.param() {name = "w3"} : bf16[64, 128]
  %b = core.param() {name = "b"} : bf16[64]
  %e = aten.embedding(%table, %ids) : bf16[s0, 128]
  %sum = aten.add.Tensor(%e, %x) : bf16[s0, 128]
  %h = aten.mul.Tensor(%sum, %gain) : bf16[s0, 128]
  %y = aten.linear(%h, %w, %b) : bf16[s0, 64] loc(in "block.fc")
  %narrow = aten.linear(%h, %w2) : bf16[s0, 64]
  %wide = aten._to_copy(%narrow) {dtype = f32} : f32[s0, 64]
  %unread = aten.linear(%h, %w3) : bf16[s0, 64]
  %logits = aten.linear(%h, %table) : bf16[s0, 300]
  return %y, %wide, %logits
}
"""


def report(text: str, passes: Pipeline) -> Report:
    graph = Graph.parse(text)
    done = run_pipeline(passes, graph)
    return build_report(done.stages, graph, done.reasons)


def test_every_reader_has_a_row_and_every_refusal_a_reason() -> None:
    found = report(MIXED, pipeline("fp8_tile"))
    assert {row.name: row.reason for row in found.rows} == {
        "e": "an embedding is a lookup, not a matmul",
        "h": "it is not a matmul",
        "y": "",
        "narrow": "",
        "unread": "it was removed because its result is not used",
        "logits": "it is the vocabulary projection: an embedding has the same weight (%table)",
    }
    assert [row.name for row in found.quantized] == ["y", "narrow"]
    assert [row.name for row in found.skipped] == ["unread", "logits"]
    assert {row.name: row.module for row in found.rows}["y"] == "block.fc"
    assert {row.name: row.weights for row in found.rows}["y"] == ("b", "w")


def test_bytes() -> None:
    found = report(MIXED, pipeline("fp8_tile"))
    matrix = 2 * 64 * 128
    assert found.bytes == 2 * 300 * 128 + 2 * 128 + 3 * matrix + 2 * 64
    assert found.bytes_quantized == 2 * matrix
    assert found.bytes_after == 2 * 300 * 128 + 2 * 128 + 2 * (64 * 128 + 4) + 2 * 64


@pytest.mark.parametrize("passes", ["fp8-tile", "fp8-tile; fuse-linear", "fp8-tile; share-quantize; to-kernels"])
def test_quantized_is_quantized_in_whatever_form(passes: str) -> None:
    found = report(MIXED, Pipeline.parse(passes))
    assert [row.name for row in found.quantized] == ["y", "narrow", "unread"]
    assert found.bytes_quantized == 3 * 2 * 64 * 128


def test_a_cast_of_the_models_own_does_not_hide_a_matmul() -> None:
    cast = """
    func @g(%x: f32[s0, 128]) -> (bf16[s0, 64]) {
      %w = core.param() {name = "w"} : f32[64, 128]
      %y = aten.linear(%x, %w) : f32[s0, 64]
      %z = aten._to_copy(%y) {dtype = bf16} : bf16[s0, 64]
      return %z
    }
    """
    found = report(cast, pipeline("fp8_tile"))
    assert [row.name for row in found.quantized] == ["y"] and found.bytes_quantized == found.bytes


def test_without_a_pass_that_quantizes() -> None:
    found = report(MIXED, Pipeline.parse("canonicalize"))
    assert {row.reason for row in found.skipped} == {"no pass of this pipeline quantizes it"}
    assert found.bytes_quantized == 0 and found.bytes_after == found.bytes
    nothing = report("func @g(%x: f32[s0]) -> (f32[s0]) {\n  return %x\n}", Pipeline.parse(""))
    assert str(nothing) == "no matmul has a constant operand; 0 B of parameters"


def test_the_table() -> None:
    lines = str(report(MIXED, pipeline("fp8_tile"))).splitlines()
    assert lines[0].split() == ["operation", "module", "weight", "bytes", "quantized", "why", "not"]
    (row,) = [line for line in lines if "%y " in line]
    assert row.split() == ["%y", "block.fc", "bf16[64,", "128]", "16.51", "kB", "fp8_tile"]
    assert (
        lines[-1]
        == "2 of 4 matmuls with a constant operand are quantized: 25.9% of 126.3 kB of parameters; 93.58 kB after"
    )
    assert all(len(line) <= 160 and line == line.rstrip() for line in lines)


def test_notebooks_show_the_same_table() -> None:
    found = report(MIXED, pipeline("fp8_tile"))
    shown = found._repr_html_()
    assert shown.count("<tr>") == 1 + len(list(found._grouped())) and shown.count("<th>") == 6
    assert "<td>%y</td><td>block.fc</td><td>bf16[64, 128]</td><td>16.51 kB</td><td>fp8_tile</td><td></td>" in shown
    assert shown.endswith(f"<p>{found.summary()}</p>")
    odd = Report(tuple(replace(row, module="<b>&") for row in found.rows), 1, 1, 1, notes=("a < b",))
    assert "<td>&lt;b&gt;&amp;</td>" in odd._repr_html_() and "<p>note: a &lt; b</p>" in odd._repr_html_()


def test_batched_experts_are_quantized_and_convolutions_are_said_to_be_left_alone() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.randn(3, 16, 16))
            self.conv, self.linear = nn.Conv1d(16, 16, 1), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(torch.relu(self.conv(torch.bmm(x, self.stack))))
            return y

    fast = qcompiler.compile(Experts().eval(), example_inputs=(torch.randn(3, 16, 16),))
    reasons = {row.op: row.reason for row in fast.report.rows}
    assert reasons["aten.bmm"] == ""
    assert reasons["aten.conv1d"] == "a convolution is not a matmul"
    assert reasons["aten.linear"] == ""


@dataclass(frozen=True)
class Remarks(Pass):
    """linear(x, w)  ->  the same, with a remark"""

    name: ClassVar[str] = "test-remarks"

    text: str = "seen"

    def run(self, graph: Graph) -> bool:
        for op in graph.ops():
            if op.name in ("aten.linear", "quant.linear"):
                graph.remark(op.result, self.text)
        return False


CAST = """
func @g(%x: f32[s0, 128]) -> (bf16[s0, 64], f32[s0, 64], f32[s0, 64]) {
  %w = core.param() {name = "w"} : f32[64, 128]
  %v = core.param() {name = "v"} : f32[64, 128]
  %u = core.param() {name = "u"} : f32[128, 64]
  %y = aten.linear(%x, %w) : f32[s0, 64] loc(in "cast")
  %z = aten._to_copy(%y) {dtype = bf16} : bf16[s0, 64]
  %plain = aten.linear(%x, %v) : f32[s0, 64]
  %matrix = aten.mm(%x, %u) : f32[s0, 64]
  %dead = aten.linear(%x, %v) : f32[s0, 64]
  return %z, %plain, %matrix
}
"""


def remarks(passes: str) -> dict[str, str]:
    graph = Graph.parse(CAST)
    done = run_pipeline(Pipeline.parse(passes), graph)
    assert graph.remarks == {}
    found = build_report(done.stages, graph, done.reasons, done.remarks)
    shown = str(found).splitlines()[0].split()
    assert ("remarks" in shown) == any(row.remark for row in found.rows)
    return {row.name: row.remark for row in found.rows}


def test_remarks_stay_with_what_they_were_made_on() -> None:
    assert remarks("canonicalize; test-remarks; dead-code") == {
        "y": "seen", "plain": "seen", "matrix": "seen", "dead": "seen",
    }  # fmt: skip
    # fuse-linear gives %y the name of the cast that follows it.
    assert remarks("test-remarks{text=first}; fp8-tile; fuse-linear; test-remarks{text=last}; to-kernels") == {
        "y": "first; last", "plain": "first; last", "matrix": "", "dead": "first; last",
    }  # fmt: skip
    assert remarks("fp8-tile; fuse-linear; test-remarks; to-kernels")["y"] == "seen"
    assert remarks("test-remarks; test-remarks{text=again}")["plain"] == "seen; again"
    assert set(remarks("fp8-tile").values()) == {""}


def test_reasons_and_remarks_on_a_name_that_was_there_for_a_while_only() -> None:
    head = 'func @g(%x: bf16[4, 8]) -> (bf16[4, 8]) {\n  %w = core.param() {name = "w"} : bf16[8, 8]\n'
    y, z, n = (f"  %{name} = aten.linear(%x, %w) : bf16[4, 8]\n" for name in "yzn")
    first, second = "  %z = aten.relu(%y) : bf16[4, 8]\n", "  %n = aten.neg(%z) : bf16[4, 8]\n"
    bodies = {"captured": y + first + second, "one": z + second, "two": n}  # fused with its reader, and once more
    stages = {name: Graph.parse(f"{head}{body}  return %n\n}}") for name, body in bodies.items()}
    (row,) = build_report(stages, stages["two"], {"z": "it is too small"}, {"z": "seen", "n": "seen again"}).rows
    assert (row.name, row.reason, row.remark) == ("y", "it is too small", "seen; seen again")


def test_the_column_of_remarks() -> None:
    graph = Graph.parse(CAST)
    done = run_pipeline(Pipeline.parse('test-remarks{text="smoothed [1/s]"}; fp8-tile'), graph)
    found = build_report(done.stages, graph, done.reasons, done.remarks)
    lines = str(found).splitlines()
    assert lines[0].split()[-3:] == ["why", "not", "remarks"]
    (row,) = [line for line in lines if "%y " in line]
    assert row.split() == ["%y", "cast", "f32[64,", "128]", "32.77", "kB", "fp8_tile", "smoothed", "[1/s]"]
    bare = build_report(done.stages, graph, done.reasons)
    assert "remarks" not in str(bare) and all(row.remark == "" for row in bare.rows)
