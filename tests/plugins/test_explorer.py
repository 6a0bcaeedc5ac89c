"""Graphs for Model Explorer: its JSON, and graphs read from our files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompiler
from qcompiler.errors import InputError, ParseError
from qcompiler.ir import Graph, print_op
from qcompiler.pass_manager.instruments import Dump
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.plugins.explorer import graph_collection
from qcompiler.schemes.named import pipeline

TEXT = """\
func @f(%x: bf16[s0, 256]) -> (bf16[s0, 128]) where s0 in 1.. {
  %w = core.param() {name = "w"} : bf16[128, 256]
  %y = aten.linear(%x, %w) : bf16[s0, 128] loc("mlp.py":7 in "layers.0.fc/1")
  return %y
}"""


def stages() -> dict[str, Graph]:
    return dict(run_pipeline(pipeline("fp8_tile"), Graph.parse(TEXT)).stages)


def attrs_of(node: dict[str, Any]) -> dict[str, str]:
    return {pair["key"]: pair["value"] for pair in node["attrs"]}


def test_one_graph_a_stage_in_order() -> None:
    found = graph_collection("f", stages())
    assert found["label"] == "f"
    assert [graph["id"].split(" ", 1)[1] for graph in found["graphs"]] == list(stages())
    assert sorted(graph["id"] for graph in found["graphs"]) == [graph["id"] for graph in found["graphs"]]


def test_nodes_are_operations_and_edges_what_they_read() -> None:
    for graph, found in zip(stages().values(), graph_collection("f", stages())["graphs"], strict=True):
        nodes = {node["id"]: node for node in found["nodes"]}
        assert len(nodes) == len(graph)
        for op, node in zip(graph, found["nodes"], strict=True):
            assert (node["label"], attrs_of(node)["line"]) == (op.name, print_op(op, locations=False))
            read = [(nodes[edge["sourceNodeId"]], int(edge["sourceNodeOutputId"])) for edge in node["incomingEdges"]]
            tags = [attrs_of(source["outputsMetadata"][place])["__tensor_tag"] for source, place in read]
            assert tags == [value.name for _, value in op.operands()]


def test_modules_are_namespaces_and_a_slash_in_a_name_is_no_way_in() -> None:
    (node,) = [n for n in graph_collection("f", stages())["graphs"][0]["nodes"] if n["label"] == "aten.linear"]
    assert node["namespace"] == "layers/0/fc\N{FRACTION SLASH}1"
    assert attrs_of(node)["source"] == "mlp.py:7"


def test_changes_are_marked_as_the_diff_has_them() -> None:
    graphs = {graph["id"].split(" ", 1)[1]: graph for graph in graph_collection("f", stages())["graphs"]}
    changes = {node["id"]: attrs_of(node).get("change") for node in graphs["fp8-tile"]["nodes"]}
    assert {name for name, change in changes.items() if change == "added"} == {
        "x_q", "x_dq", "w_q", "w_dq", "y_f32",
    }  # fmt: skip
    assert changes["y"] == "changed"
    assert changes["x"] is changes["w"] is None
    assert not any(attrs_of(node).get("change") for node in graphs["captured"]["nodes"])


def test_a_compiled_model_is_exported(tmp_path: Path) -> None:
    graph = Graph.parse(TEXT)
    graph.weights["w"] = torch.ones(128, 256, dtype=torch.bfloat16)
    fast = qcompiler.compile(graph)
    fast.export("model-explorer", tmp_path / "all.json")
    assert json.loads((tmp_path / "all.json").read_text()) == graph_collection(fast.graph.name, fast.stages)
    fast.export("model-explorer", tmp_path / "one.json", "captured")
    assert len(json.loads((tmp_path / "one.json").read_text())["graphs"]) == 1
    with pytest.raises(InputError, match="the graphs cannot be written"):
        fast.export("model-explorer", tmp_path / "missing" / "all.json")


def test_model_explorer_opens_text_and_all_stages_of_a_dump(tmp_path: Path) -> None:
    manager_module = pytest.importorskip("model_explorer.extension_manager")
    manager = manager_module.ExtensionManager(["qcompiler.plugins.explorer"])
    manager.load_extensions()

    def converted(path: Path) -> Any:
        command = {"cmdId": "convert", "extensionId": "qcompiler", "modelPath": str(path), "settings": {}}
        (collection,) = manager.run_cmd(command)["graphCollections"]
        return collection

    (tmp_path / "f.qir").write_text(TEXT, encoding="utf-8")
    alone = converted(tmp_path / "f.qir")
    assert (alone["label"], [graph["id"] for graph in alone["graphs"]]) == ("f.qir", ["00 f"])
    steps = Pipeline.parse("fp8-tile; dead-code; dead-code")
    done = run_pipeline(steps, Graph.parse(TEXT), instruments=[Dump(tmp_path / "dump")])
    dumped = converted(tmp_path / "dump" / "01_fp8-tile.qir")
    want = graph_collection("dump", done.stages)
    assert [graph["id"] for graph in dumped["graphs"]] == [graph["id"] for graph in want["graphs"]]
    for graph, other in zip(dumped["graphs"], want["graphs"], strict=True):
        for node, written in zip(graph["nodes"], other["nodes"], strict=True):
            assert {key: node[key] for key in written if key != "style"} == {
                key: value for key, value in written.items() if key != "style"
            }
    (tmp_path / "bad.qir").write_text("func", encoding="utf-8")
    with pytest.raises(ParseError, match=r"bad\.qir:1"):
        converted(tmp_path / "bad.qir")
    with pytest.raises(InputError, match="cannot be read"):
        converted(tmp_path / "missing.qir")
