"""README.md and docs/*.md: their Python runs, in order, and prints what they say it prints.

A ```text block directly behind a ```python block is its output. Blocks that begin ```python no-run are skipped.
`QCOMPILER_UPDATE=1 pytest tests/test_docs.py` rewrites the outputs; a person reads the diff.
"""

import contextlib
import io
import linecache
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from qcompiler import knobs
from qcompiler.pass_manager import PASSES

ROOT = Path(__file__).parents[1]
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]
EXTRAS = {"mlir.md": ("torch_mlir", "iree")}
"""Page -> packages that are optional and that it is about."""

BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?P<gap>\n*)(?P<shown>^```text\n(?P<output>.*?)^```\n)?", re.M | re.S
)


def rerun(page: str, name: str) -> str:
    """The page with the outputs that it has today."""
    module = ModuleType("a_page_of_the_docs")
    sys.modules[module.__name__] = module

    def run(block: re.Match[str]) -> str:
        line = page.count("\n", 0, block.start("code"))
        code = "\n" * line + block["code"]
        linecache.cache[name] = (len(page), None, page.splitlines(True), name)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, name, "exec"), module.__dict__)
        output = "\n".join(row.rstrip() for row in printed.getvalue().strip("\n").split("\n"))
        shown = f"```text\n{output}\n```\n" if block["shown"] else ""
        return f"```python\n{block['code']}```\n{block['gap']}{shown}"

    try:
        return BLOCK.sub(run, page)
    finally:
        sys.modules.pop(module.__name__)
        for step in [step for step, kind in PASSES.items() if kind.__module__ == module.__name__]:
            del PASSES[step]


@pytest.mark.parametrize("path", PAGES, ids=[path.name for path in PAGES])
def test_the_code_on_a_page_runs_and_prints_what_the_page_says(path: Path) -> None:
    if missing := [name for name in EXTRAS.get(path.name, ()) if find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}: pip install -e '.[mlir,iree]'")
    page = path.read_text(encoding="utf-8")
    today = rerun(page, path.name)
    if knobs.current().update:
        path.write_text(today, encoding="utf-8")
    else:
        assert today == page


def test_a_wrong_output_and_a_failing_block_are_noticed() -> None:
    page = "```python\nx = 6\n```\n\n```python\nprint(x * 7)\n```\n\n```text\n41\n```\n\n```python no-run\n1 / 0\n```\n"
    assert rerun(page, "page.md") == page.replace("41", "42")
    with pytest.raises(ZeroDivisionError):
        rerun("```python\n1 / 0\n```\n", "page.md")
