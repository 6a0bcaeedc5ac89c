"""The format of a quantized matmul, spelled as in the scheme after each pass that rewrites the matmul."""

from pathlib import Path
from typing import Any

import pytest

from qcompiler.artefact.report_text import report_from_json, report_to_json
from qcompiler.artefact.strict_json import parse, render
from qcompiler.calibration import Calibration
from qcompiler.ir import DType, Format, Graph
from qcompiler.ir.formats import FP8_ROW, INT8_TENSOR, NVFP4
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.report.report import Report, build_report
from qcompiler.schemes.named import SCHEMES, pipeline
from qcompiler.schemes.quantized_formats import Formats
from qcompiler.testing import random_inputs

TEXT = """
func @m(%x: f32[4, 256]) -> (f32[4, 64]) {
  %w = core.param() {name = "w"} : f32[64, 256]
  %y = aten.linear(%x, %w) : f32[4, 64] loc(in "fc")
  return %y
}
"""
PLAIN = [name for name, scheme in SCHEMES.items() if scheme.spec is not None and scheme.spec.smooth == "never"]


def report_of(passes: Pipeline) -> Report:
    graph = Graph.parse(TEXT)
    inputs, graph.weights = random_inputs(graph, 3)
    graph.calibration = Calibration([inputs])
    done = run_pipeline(passes, graph)
    return build_report(done.stages, graph, done.reasons, done.remarks)


@pytest.mark.parametrize(
    "scheme",
    [
        *PLAIN, "fp8_tile{k_block=64}", "fp8_tile{k_block=-1}", "fp8_tile{numerics=vllm}", "fp8_row{dtype=f8e5m2}",
        "int8_tensor{w=channel}", "fp8_tensor_static{w=channel}",
    ],
)  # fmt: skip
def test_a_format_is_spelled_as_its_scheme(scheme: str) -> None:
    (row,) = report_of(pipeline(scheme)).rows
    assert row.quantized and row.format == scheme


@pytest.mark.parametrize(
    ("scheme", "format"),
    [
        ("smoothquant_o1", "int8_row{w=tensor}"),
        ("smoothquant_o1{w=channel}", "int8_row"),
        ("smoothquant_o2", "int8_tensor"),
        ("smoothquant_o3", "int8_tensor_static"),
        ("fp8_tile{scale=ue8m0}", "fp8_tile{numerics=ue8m0}"),
    ],
)
def test_smoothing_is_no_part_of_a_format(scheme: str, format: str) -> None:
    (row,) = report_of(pipeline(scheme)).rows
    assert row.format == format


@pytest.mark.parametrize("passes", ["fp8-tile", "fp8-tile; fuse-linear", "fp8-tile; fuse-linear; to-kernels"])
def test_in_each_form(passes: str) -> None:
    assert [row.format for row in report_of(Pipeline.parse(passes)).rows] == ["fp8_tile"]


def test_what_no_scheme_has_is_spelled_out() -> None:
    assert str(Formats(Format(DType.f8e4m3fn, (1, 32)), FP8_ROW)) == "#format<f8e4m3fn, block = [1, 32]> x #fp8_row"
    assert str(Formats(INT8_TENSOR, NVFP4, static=True)) == "#int8_tensor x #nvfp4 static"


def test_what_is_not_quantized_has_none() -> None:
    (row,) = report_of(Pipeline.parse("canonicalize")).rows
    assert not row.quantized and row.format == ""


def test_matmuls_of_constants_are_not_layers() -> None:
    graph = Graph.parse("""
        func @m(%x: f32[4, 64]) -> (f32[4, 64]) {
          %w = core.param() {name = "w"} : f32[64, 64]
          %a = core.param() {name = "a"} : f32[16, 64]
          %b = core.param() {name = "b"} : f32[64, 16]
          %ba = aten.mm(%b, %a) : f32[64, 64]
          %sum = aten.add.Tensor(%w, %ba) : f32[64, 64]
          %y = aten.linear(%x, %sum) : f32[4, 64]
          return %y
        }
    """)
    done = run_pipeline(pipeline("fp8_tile"), graph)
    found = build_report(done.stages, graph, done.reasons)
    assert [(row.name, row.weights, row.quantized) for row in found.rows] == [("y", ("a", "b", "w"), True)]
    assert found.summary().startswith("1 of 1 matmuls")


def from_document(document: Any) -> Report:
    report, *_ = report_from_json(parse(render(document).encode(), Path("report.json")))
    return report


def test_reports_of_older_artefacts_have_no_format() -> None:
    report = report_of(pipeline("fp8_tile"))
    document = report_to_json(report, (), {})
    assert from_document(document) == report
    for row in document["rows"]:
        del row["format"]
    (old,) = from_document(document).rows
    assert old.quantized and old.format == "" and " yes" in str(from_document(document))
