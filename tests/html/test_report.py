"""The HTML report as data and as text: complete, small, and safe for any characters in a model's names."""

import base64
import hashlib
import html.parser
import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hopper_kernels import choose
from torch import nn

import qcompiler
from codegen.targets.hopper import HOPPER
from codegen.templates.gemm import GemmProblem
from qcompiler.errors import CaptureError, InputError
from qcompiler.html import html_report
from qcompiler.html.kernels import ROWS, describe_kernels
from qcompiler.html.page import as_script_data
from qcompiler.ir import print_op

HOSTILE = "</script><script>hacked = 1</script><!--<img src=x onerror=hacked=1>\u2028"
TEXT = f"""\
func @f(%x: bf16[4, 128]) -> (bf16[4, 128]) {{
  %w = core.param() {{name = "w"}} : bf16[128, 128]
  %y = aten.linear(%x, %w) : bf16[4, 128] loc({json.dumps(HOSTILE)}:1 in {json.dumps(HOSTILE)})
  return %y
}}"""


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(256, 512), nn.SiLU(), nn.Linear(512, 256), nn.Linear(256, 3)).to(torch.bfloat16).eval()
    )


@pytest.fixture(scope="module")
def compiled() -> Any:
    model = mlp()
    fast = qcompiler.compile(
        model, example_inputs=(torch.randn(4, 256, dtype=torch.bfloat16),), overrides={"3.*": None}
    )
    return fast


@pytest.fixture(scope="module")
def page(compiled: Any) -> str:
    return html_report(compiled)


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def hostile() -> qcompiler.Graph:
    graph = qcompiler.Graph.parse(TEXT)
    graph.weights = {"w": torch.randn(128, 128, dtype=torch.bfloat16)}
    return graph


class Elements(html.parser.HTMLParser):
    """What a browser would make of a page: its elements, with their attributes, and the text in scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag in self.texts:
            self.texts[self.lasttag][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.lasttag = ""


def test_every_line_of_every_stage_is_there(compiled: Any, page: str) -> None:
    data = data_of(page)
    assert [stage["name"] for stage in data["stages"]] == list(compiled.stages)
    for stage in data["stages"]:
        graph = compiled.stages[stage["name"]]
        lines = [data["ops"][number]["text"] for number in stage["ops"]]
        assert lines[len(graph.inputs) :] == [print_op(op, locations=False) for op in list(graph)[len(graph.inputs) :]]


def test_equal_lines_are_there_once(page: str) -> None:
    data = data_of(page)
    assert sum(len(stage["ops"]) for stage in data["stages"]) > 3 * len(data["ops"])
    assert len({(op["text"], op["place"]) for op in data["ops"]}) == len(data["ops"])


def test_passes_come_with_what_is_known_of_them(compiled: Any, page: str) -> None:
    stages = data_of(page)["stages"]
    assert "spec" not in stages[0]
    for stage, step in zip(stages[1:], compiled.steps, strict=True):
        assert (stage["spec"], stage["effect"], stage["changed"], stage["seconds"]) == (
            step.spec, step.effect, step.changed, step.seconds,
        )  # fmt: skip


def test_decisions_and_reasons(compiled: Any, page: str) -> None:
    data = data_of(page)
    assert [(row["name"], row["quantized"], row["reason"]) for row in data["decisions"]] == [
        (row.name, row.quantized, row.reason) for row in compiled.report.rows
    ]
    reasons = {
        stage["name"]: {name: data["sentences"][number] for name, number in stage["leftAlone"].items()}
        for stage in data["stages"][1:]
    }
    assert reasons == compiled.skipped
    assert "linear_2" in reasons["fp8-tile"]


def test_errors_are_shown_when_they_were_measured(page: str) -> None:
    assert data_of(page)["errors"] is None
    model, batch = mlp(), torch.randn(4, 256, dtype=torch.bfloat16)
    fast = qcompiler.compile(model, example_inputs=(batch,))
    attribution = qcompiler.attribute_error(fast, batch)
    rows = data_of(html_report(fast, attribution))["errors"]
    assert [row["name"] for row in rows] == [row.name for row in attribution.rows]
    assert [row["own"] for row in rows] == [row.own for row in attribution.rows]
    assert {row["kernel"] for row in rows} == {"inf"}


def test_kernels_come_with_the_configuration_that_the_target_chooses(compiled: Any, page: str) -> None:
    described = describe_kernels(compiled.program.graph, HOPPER)
    assert described["rows"] == ROWS and described["gpu"] == "Hopper GPU with 132 multiprocessors"
    kinds = described["kinds"]
    (gemm,) = [kind for kind in kinds if kind["op"] == "kernel.scaled_linear" and kind["result"] == "bf16[s0, 256]"]
    assert gemm["choices"] == [str(choose(GemmProblem(rows, 256, 512))) for rows in ROWS]
    assert sum(len(kind["values"]) for kind in kinds if "linear" in kind["op"]) == 2
    on_cpu = data_of(page)["kernels"]
    assert on_cpu["rows"] == [] and on_cpu["gpu"] is None and not any(kind["choices"] for kind in on_cpu["kinds"])
    assert [kind["values"] for kind in on_cpu["kinds"]] == [kind["values"] for kind in kinds]


def test_equal_kernels_stand_together() -> None:
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(5))).to(torch.bfloat16).eval()
    fast = qcompiler.compile(model, example_inputs=(torch.randn(4, 128, dtype=torch.bfloat16),))
    kinds = {kind["op"]: len(kind["values"]) for kind in data_of(html_report(fast))["kernels"]["kinds"]}
    assert kinds == {"kernel.quantize": 1, "kernel.fused_linear": 4, "kernel.scaled_linear": 1}


def test_what_cannot_run_on_a_gpu_says_why() -> None:
    fast = qcompiler.compile(
        mlp(), example_inputs=(torch.randn(4, 256, dtype=torch.bfloat16),), scheme="fp8_tile{k_block=16}"
    )
    kinds = describe_kernels(fast.program.graph, HOPPER)["kinds"]
    choices = [choice for kind in kinds for choice in kind["choices"]]
    assert choices
    assert all(choice.startswith("no kernel: ") for choice in choices)


def test_the_page_needs_nothing_else(page: str) -> None:
    elements = Elements(page).found
    assert not [attrs for _, attrs in elements if {"src", "href", "srcset", "action"} & attrs.keys()]
    policies = [attrs["content"] for _, attrs in elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert str(policies[0]).startswith("default-src 'none'; ")
    assert "unsafe" not in str(policies[0])


def test_the_policy_names_every_script_and_style(page: str) -> None:
    parsed = Elements(page)
    (policy,) = [str(a["content"]) for _, a in parsed.found if a.get("http-equiv") == "Content-Security-Policy"]
    _, *scripts = parsed.texts["script"]  # the first is data
    assert len(scripts) == 2
    for text in (*scripts, *parsed.texts["style"]):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy


def test_the_library_is_named_with_its_licence(page: str, root: Path) -> None:
    folder = root / "qcompiler/html/static/vendor"
    version = re.search(r'="(\d+\.\d+\.\d+)"', (folder / "dagre.min.js").read_text(encoding="utf-8"))
    assert version is not None
    assert f"dagre {version[1]}, MIT licence" in page
    assert "Permission is hereby granted" in page


def test_names_that_look_like_markup_stay_names() -> None:
    page = html_report(qcompiler.compile(hostile(), target="cpu"))
    clean = html_report(qcompiler.compile(mlp(), example_inputs=(torch.randn(4, 256, dtype=torch.bfloat16),)))
    assert [tag for tag, _ in Elements(page).found] == [tag for tag, _ in Elements(clean).found]
    assert "\u2028" not in page
    data = data_of(page)
    assert HOSTILE in {place[2] for place in data["places"]}
    assert [row["module"] for row in data["decisions"]] == [HOSTILE]


@pytest.mark.parametrize("text", ["</script>", "<!--", "]]>", "\u2028\u2029", '"\\', "\ud800", "ünï 漢字"])
def test_data_in_a_script_reads_back(text: str) -> None:
    written = as_script_data({"name": text})
    assert not set(written) & set("<>&\u2028\u2029")
    assert json.loads(written) == {"name": text}


def test_a_page_is_written_whole_or_not_at_all(compiled: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    compiled.to_html(path)
    first = path.read_text(encoding="utf-8")
    assert first == html_report(compiled)
    assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRUSR
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(InputError, match=r"cannot be written: got .*; need the path of a file, in a folder that can"):
        compiled.to_html(tmp_path / "missing" / "report.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        compiled.to_html(tmp_path / "folder")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["folder", "report.html"]


def test_a_model_that_is_not_captured_has_no_report() -> None:
    with pytest.raises(CaptureError, match="not captured yet"):
        html_report(qcompiler.compile(mlp()))


def test_a_name_that_is_no_text_does_not_stop_the_page(tmp_path: Path) -> None:
    graph = hostile()
    graph["y"].op.loc = qcompiler.ir.Location(module="\ud800")
    qcompiler.compile(graph, target="cpu").to_html(tmp_path / "page.html")
    assert data_of((tmp_path / "page.html").read_text(encoding="utf-8"))["stages"]
