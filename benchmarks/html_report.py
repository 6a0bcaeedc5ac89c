"""The size of the HTML report of a large model, and how fast a browser opens and navigates it.

    python benchmarks/html_report.py [--out FOLDER]

The model is Llama-3-8B built from its configuration, with weights on the meta device. The browser is headless Chromium
without a GPU. Each time is the median of 5 runs. Opening counts from the start of the navigation to the end of the
page's own scripts, in a new window each time.
"""

import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
import torch
import transformers
from compiler_speed import LLAMA_3_8B
from playwright.sync_api import Browser, Page, sync_playwright

import qcompiler
from qcompiler.capture import capture
from qcompiler.html import html_report, write_page
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.report.report import build_report

RUNS = 5
MOVES = {
    "next pass ms": "document.querySelector('[aria-current]').closest('li').nextSibling.firstChild.click()",
    "open a layer ms": "document.querySelector('[data-module=\"model.layers.5\"]').dispatchEvent(new Event('click'))",
    "open all ms": "document.querySelector('[aria-label=\"Open all modules\"]').click()",
    "search ms": (
        "const field = document.querySelector('#search');"
        "field.value = 'linear'; field.dispatchEvent(new Event('input'))"
    ),
}


def compiled(layers: int) -> Any:
    """The part of a compiled model that the report needs, for a model on the meta device."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_3_8B, num_hidden_layers=layers)).eval()
        ids = torch.zeros(2, 16, dtype=torch.int64)
    graph = capture(model, (ids,), allow_meta=True).graph.clone(weights=False)
    steps = qcompiler.pipeline("fp8_tile")
    done = run_pipeline(steps, graph)
    report = build_report(done.stages, graph, done.reasons, done.remarks)
    settings = SimpleNamespace(target="sm_90a")
    return SimpleNamespace(
        graph=graph, stages=done.stages, steps=done.steps, skipped=done.skipped, report=report, pipeline=steps,
        settings=settings, weights=SimpleNamespace(device=torch.device("cpu")),
    )  # fmt: skip


def opening(browser: Browser, path: Path) -> tuple[float, Page]:
    """Milliseconds until the page has drawn its first graph, and the page."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    return page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"), page


def moving(page: Page, script: str) -> float:
    """Milliseconds from a user action to the finished layout."""
    timed = f"const start = performance.now(); {script}; document.querySelector('.scene').getBBox();"
    return page.evaluate(f"(() => {{ {timed} return performance.now() - start; }})()")


def measure(browser: Browser, layers: int, folder: Path) -> dict[str, Any]:
    """One row."""
    model, path = compiled(layers), folder / f"{layers}.html"
    start = time.perf_counter()
    write_page(path, html_report(model))
    seconds = time.perf_counter() - start
    times: dict[str, list[float]] = {"open ms": [], **{name: [] for name in MOVES}}
    for _ in range(RUNS):
        ms, page = opening(browser, path)
        times["open ms"].append(ms)
        nodes = page.locator(".node").count()
        for name, script in MOVES.items():
            times[name].append(moving(page, script))
        page.close()
    lines = sum(len(graph) for graph in model.stages.values())
    row = {"layers": layers, "stages": len(model.stages), "lines": lines, "write s": seconds}
    row |= {"page MB": path.stat().st_size / 1e6, "nodes at first": nodes}
    return row | {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    harness.arguments()
    transformers.utils.logging.set_verbosity_error()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        rows = [measure(browser, layers, Path(folder)) for layers in (8, 32)]
        facts = {
            "chromium": browser.version,
            "cores": str(torch.get_num_threads()),
            "python": platform.python_version(),
        }
        browser.close()
    harness.report("html-report", "The HTML report of Llama-3-8B with the scheme fp8_tile, in Chromium", rows, facts)


if __name__ == "__main__":
    main()
