"""The HTML report in a browser: it opens from a file, searches, opens modules, walks the passes, and stays silent."""

import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

import qcompiler
from qcompiler.html import write_page
from qcompiler.html.page import render_page

try:
    from playwright.sync_api import Browser, Page, expect, sync_playwright
except ImportError:
    pytest.skip("needs playwright", allow_module_level=True)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, of which none is on the path")

LAYERS = 32
MINUS = "\N{MINUS SIGN}"
HOSTILE = "</script><script>hacked = 1</script>.<img src=x onerror=hacked=1>.\u2028"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def compiled() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        num_hidden_layers=2,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config)
    model = model.bfloat16().eval()
    batch = {"input_ids": torch.arange(12).reshape(2, 6)}
    fast = qcompiler.compile(model, example_kwargs=batch)
    return fast, qcompiler.attribute_error(fast, batch)


@pytest.fixture(scope="module")
def report(compiled: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("html") / "report.html"
    fast, attribution = compiled
    fast.to_html(path, attribution)
    return path


class Opened:
    """A page, with its console messages and requests."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def goto(self, path: Path, fragment: str = "") -> Page:
        self.page.goto(f"{path.as_uri()}{fragment}")
        self.page.wait_for_selector("html[data-ready]", state="attached")
        return self.page


@pytest.fixture
def opened(browser: Browser) -> Iterator[Opened]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    found = Opened(page)
    yield found
    assert found.complaints == []
    assert len([url for url in found.requests if not url.startswith("data:")]) <= 2  # itself, and again in one test
    assert all(url.startswith(("file:", "data:")) for url in found.requests)
    page.close()


def test_it_opens_at_the_pass_that_quantizes(opened: Opened, report: Path, compiled: Any) -> None:
    page = opened.goto(report)
    fast, _ = compiled
    assert page.locator("#strip button").evaluate_all("all => all.map(each => each.dataset.stage)") == list(fast.stages)
    expect(page.locator("#strip [aria-current]")).to_contain_text("fp8-tile")
    expect(page.locator("#summary")).to_have_text(fast.report.summary())
    assert page.locator(".node").count() > 10


def test_the_strip_counts_what_the_printed_diff_shows(opened: Opened, report: Path, compiled: Any) -> None:
    page = opened.goto(report)
    fast, _ = compiled
    stages = list(fast.stages.items())
    for (_, before), (name, after) in pairwise(stages):
        lines = qcompiler.diff(before, after, context=0).splitlines()[2:]
        marks = page.locator(f'[data-stage="{name}"] b').all_inner_texts()
        counts = dict.fromkeys(f"+{MINUS}~", 0) | {mark[0]: int(mark[1:]) for mark in marks}
        assert counts["+"] + counts["~"] == sum(line.startswith("+") for line in lines), name
        assert counts[MINUS] + counts["~"] == sum(line.startswith("-") for line in lines), name


def test_arrows_go_through_the_passes(opened: Opened, report: Path, compiled: Any) -> None:
    page = opened.goto(report, "#stage=captured")
    for name in list(compiled[0].stages)[1:]:
        page.keyboard.press("ArrowRight")
        expect(page.locator("#strip [aria-current]")).to_have_attribute("data-stage", name)
    page.keyboard.press("ArrowRight")  # the last one has no successor
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#strip [aria-current]")).to_have_attribute("data-stage", "fuse-activation-quantize")
    assert "stage=fuse-activation-quantize" in page.url


def test_modules_open_and_close(opened: Opened, report: Path) -> None:
    page = opened.goto(report)
    page.get_by_role("button", name="Close all modules").click()
    expect(page.locator(".box")).to_have_count(0)
    closed = page.locator('.module[data-module="model"]')
    expect(closed).to_have_attribute("aria-expanded", "false")
    closed.focus()
    page.keyboard.press("Enter")
    expect(page.locator('.head[data-module="model"]')).to_have_attribute("aria-expanded", "true")
    assert page.locator(".node").count() > 10
    page.locator('.head[data-module="model"]').dispatch_event("click")
    expect(closed).to_have_count(1)
    page.get_by_role("button", name="Open all modules").click()
    expect(page.locator(".module")).to_have_count(0)
    expect(page.locator('.op[data-op="linear_6"]')).to_have_count(1)


def test_nodes_do_not_overlap(opened: Opened, report: Path) -> None:
    page = opened.goto(report, "#stage=fuse-epilogue")
    page.get_by_role("button", name="Open all modules").click()
    boxes = page.locator(".node").evaluate_all(
        "all => all.map(each => { const r = each.querySelector('rect').getBoundingClientRect();"
        " return [r.left, r.top, r.right, r.bottom]; })"
    )
    assert len(boxes) > 100
    for index, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[index + 1 :]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_every_reading_is_one_edge(opened: Opened, report: Path, compiled: Any) -> None:
    page = opened.goto(report, "#stage=captured")
    for label in ("weights", "sizes"):
        page.get_by_label(label).check()
    page.get_by_role("button", name="Open all modules").click()
    graph = compiled[0].stages["captured"]
    expect(page.locator(".node")).to_have_count(len(graph))
    pairs = {(value.op, op) for op in graph for _, value in op.operands()}
    expect(page.locator(".edge")).to_have_count(len(pairs))
    ends = page.locator(".edge").evaluate_all("all => all.map(each => each.querySelector('.wide title').textContent)")
    assert {name for text in ends for name in text.split("\n")} == {
        str(value) for op in graph for _, value in op.operands()
    }


def codes_of(fast: Any, module: str) -> str:
    """The name of the quantized activation that the linear of a module multiplies."""
    (op,) = [op for op in fast.stages["fuse-linear"].ops("quant.linear") if op.loc.module == module]
    name: str = op["x"].name
    return name


def test_search_finds_and_goes_there(opened: Opened, report: Path, compiled: Any) -> None:
    name = codes_of(compiled[0], "model.layers.1.mlp.down_proj")
    page = opened.goto(report, "#stage=fp8-tile")
    page.get_by_role("button", name="Close all modules").click()
    page.keyboard.press("/")
    page.keyboard.type("quant.quantize layers.1.mlp.down")
    expect(page.locator("#count")).to_have_text("2")
    expect(page.get_by_role("option")).to_have_count(2)
    expect(page.locator(".module.found")).to_have_count(1)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("#panel h2")).to_have_text(f"%{name}")
    expect(page.locator(f'.op.selected[data-op="{name}"]')).to_be_in_viewport()
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    expect(page.locator("#panel")).to_be_hidden()


def test_the_panel_says_all_that_is_known(opened: Opened, report: Path, compiled: Any) -> None:
    fast, attribution = compiled
    page = opened.goto(report, "#stage=fuse-linear&op=linear_6")
    panel = page.locator("#panel")
    op = fast.stages["fuse-linear"]["linear_6"].op
    before = fast.stages["share-quantize"]["linear_6"].op
    lines = panel.locator("pre").all_inner_texts()
    assert lines == [qcompiler.ir.print_op(each, locations=False) for each in (before, op)]
    (row,) = [row for row in attribution.rows if row.name == "linear_6"]
    for text in ("changed", "model.layers.0.mlp.down_proj", "modeling_llama.py:", "fuse-linear", "x_format",
                 "#fp8_tile", "bf16[s0, s1, 128]", f"{row.own:.1f} dB", "exact", "quantized"):  # fmt: skip
        expect(panel).to_contain_text(text)
    name = codes_of(fast, "model.layers.0.mlp.down_proj")
    panel.get_by_role("button", name=f"%{name}", exact=True).click()
    expect(panel.locator("h2")).to_have_text(f"%{name}")
    page.goto("about:blank")
    page = opened.goto(report, "#stage=fp8-tile&op=linear_14")
    (reason,) = [row.reason for row in fast.report.rows if row.name == "linear_14"]
    expect(page.locator("#panel")).to_contain_text(f"not quantized {reason}")
    expect(page.locator("#panel")).to_contain_text(fast.skipped["fp8-tile"]["linear_14"])


def test_before_both_and_after(opened: Opened, report: Path) -> None:
    page = opened.goto(report, "#stage=fuse-linear&op=linear_6")
    expect(page.locator('.op.fate-removed[data-op="linear_6_f32"]')).to_have_count(1)
    expect(page.locator('.op.fate-changed[data-op="linear_6"]')).to_have_count(1)
    assert page.locator(".edge.old").count() > 0
    page.locator('[data-side="after"]').click()
    expect(page.locator(".op.fate-removed")).to_have_count(0)
    expect(page.locator('.op[data-op="linear_6"] text').first).to_contain_text("quant.linear")
    page.locator('[data-side="before"]').click()
    expect(page.locator('.op.fate-removed[data-op="linear_6_f32"]')).to_have_count(1)
    expect(page.locator('.op.fate-changed[data-op="linear_6"] text').first).to_contain_text("_to_copy")


def test_tables_filter_and_sort(opened: Opened, report: Path, compiled: Any) -> None:
    fast, attribution = compiled
    page = opened.goto(report)
    page.keyboard.press("2")
    rows = page.locator("#decisions tbody tr")
    expect(rows).to_have_count(len(fast.report.rows))
    page.get_by_label("matmuls only").check()
    page.get_by_label("skipped only").check()
    expect(rows).to_have_count(len(fast.report.skipped))
    page.get_by_label("skipped only").uncheck()
    page.keyboard.press("/")
    page.keyboard.type("layers.1 mlp")
    expect(rows).to_have_count(3)
    page.locator("#decisions").get_by_role("button", name="size").click()
    expect(page.locator("#decisions th[aria-sort=descending]")).to_have_text("size")
    rows.first.get_by_role("button").click()
    expect(page.locator("#tab-graph")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#panel h2")).to_have_text("%linear_11")
    page.locator("#tab-errors").click()
    expect(page.locator("#errors tbody tr")).to_have_count(len(attribution.rows))
    expect(page.locator("#errors tbody tr").first).to_contain_text(f"{attribution.rows[0].own:.1f} dB")
    page.locator("#tab-memory").click()
    expect(page.locator("#memory .level .amount").last).to_have_text(fast.report.summary().rpartition("; ")[2][:-6])
    page.locator("#tab-kernels").click()
    assert page.locator("#kernels tbody tr").count() > 3


def test_the_address_keeps_the_place(opened: Opened, report: Path) -> None:
    page = opened.goto(report, "#stage=to-kernels&side=after&op=linear_6")
    expect(page.locator("#strip [aria-current]")).to_have_attribute("data-stage", "to-kernels")
    expect(page.locator('[data-side="after"]')).to_have_attribute("aria-pressed", "true")
    expect(page.locator('.op.selected[data-op="linear_6"]')).to_have_count(1)
    page.evaluate("location.hash = 'stage=nonsense&view=nonsense&op=nonsense'")
    expect(page.locator("#strip [aria-current]")).to_have_attribute("data-stage", "fp8-tile")


def test_names_that_look_like_markup_do_nothing(opened: Opened, tmp_path: Path) -> None:
    place = json.dumps(HOSTILE)
    text = f"""\
        func @f(%x: bf16[4, 128]) -> (bf16[4, 128]) {{
          %w = core.param() {{name = "w"}} : bf16[128, 128]
          %y = aten.linear(%x, %w) : bf16[4, 128] loc({place}:1 in {place})
          return %y
        }}"""
    graph = qcompiler.Graph.parse(text)
    graph.weights = {"w": torch.zeros(128, 128, dtype=torch.bfloat16)}
    qcompiler.compile(graph, target="cpu").to_html(tmp_path / "page.html")
    page = opened.goto(tmp_path / "page.html", "#stage=captured&op=y")
    for key in "12345":
        page.keyboard.press(key)
    page.keyboard.press("1")
    expect(page.locator("#panel")).to_contain_text(HOSTILE[:40])
    page.get_by_role("button", name="Open all modules").click()
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("img").count() == 0


def test_an_empty_table_and_a_graph_without_passes(opened: Opened, tmp_path: Path) -> None:
    data: dict[str, Any] = {
        "name": "f", "pipeline": "", "target": "cpu", "summary": "nothing", "notes": [], "decisions": [],
        "errors": None, "stages": [{"name": "captured", "ops": [], "leftAlone": {}}],
        "ops": [], "places": [], "sentences": [], "kernels": {"rows": [], "gpu": None, "kinds": []},
    }  # fmt: skip
    write_page(tmp_path / "page.html", render_page("f", data))
    page = opened.goto(tmp_path / "page.html")
    expect(page.locator("#notice")).to_have_text("There is nothing to draw.")
    for key, text in zip(
        "2345", ("no matching operation", "to_html(", "holds no weights", "does not call any"), strict=True
    ):
        page.keyboard.press(key)
        expect(page.locator("main > section:not([hidden])")).to_contain_text(text)


def test_it_is_narrow_on_a_narrow_screen_and_dark_in_the_dark(browser: Browser, report: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 780}, color_scheme="dark")
    Opened(page).goto(report, "#stage=fp8-tile&op=linear_6")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    expect(page.locator("#panel")).to_be_in_viewport()
    page.close()


class Block(nn.Module):
    """A layer with a residual stream, and a value that all layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(128)
        self.gate, self.up, self.down = nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 128)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        y = self.norm(x) * scale
        out: torch.Tensor = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        return out


class Stack(nn.Module):
    """Many layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.mean()
        for layer in self.layers:
            x = layer(x, scale)
        return x


def test_a_deep_model_opens_with_its_layers_closed(opened: Opened, tmp_path: Path) -> None:
    fast = qcompiler.compile(
        Stack().to(torch.bfloat16).eval(), example_inputs=(torch.randn(4, 128, dtype=torch.bfloat16),)
    )
    fast.to_html(tmp_path / "page.html")
    page = opened.goto(tmp_path / "page.html")
    assert page.locator(".node").count() < 100
    expect(page.locator('.module[data-module^="layers."]')).to_have_count(LAYERS)
    expect(page.locator(".edge:not(.far)")).to_have_count(LAYERS + 3)
    mean = page.locator(".op", has_text="mean")
    expect(mean).to_contain_text(f"→ {LAYERS - 1} more")
    mean.dispatch_event("click")
    expect(page.locator(".edge.far.near")).to_have_count(LAYERS - 1)
    page.locator('[data-module="layers.17"]').dispatch_event("click")
    expect(page.locator('.op[data-op="silu_17"]')).to_have_count(1)
