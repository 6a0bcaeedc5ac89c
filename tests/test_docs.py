"""Docs pages are tests: the code of each page runs in order in its own folder and must print the page's outputs.

    ```python           runs; a ```text block directly after it is its output
    ```sh               runs in the same way, with `qcompiler` from this tree
    <!-- python … -->   runs, hidden from readers: setup for a block
    ```python gpu       runs on a Hopper GPU; elsewhere the test only checks its syntax
    … no-run            does not run: ```sh that installs something; avoid it for ```python

`QCOMPILER_UPDATE=1 pytest tests/test_docs.py` rewrites the outputs; a person reads the diff.
"""

import contextlib
import io
import linecache
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qcompiler import knobs
from qcompiler.cli.ir_reference import ir_reference
from qcompiler.pass_manager.pipeline import PASSES
from qcompiler.schemes.named import SCHEMES

ROOT = Path(__file__).parents[1]
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")})
EXTRAS = {"mlir.md": ("torch_mlir", "iree")}
"""Page -> optional packages that the page needs."""
BLOCK = re.compile(
    r"^(?P<open>```python|```python gpu|```sh|<!-- python)\n(?P<code>.*?)(?P<close>^```|^-->)\n(?P<gap>\n*)"
    r"(?P<shown>^```text\n.*?^```\n)?",
    re.M | re.S,
)
FENCE = re.compile(r"^```(\w[^\n]*)\n.*?^```$", re.M | re.S)
"""A block with a mark."""
SHELLS = ("sh", "bash", "shell", "console")
MARKS = ("python", "python gpu", "python no-run", "sh", "sh no-run")


class Page:
    """One running page: the names its blocks have defined, and their working folder."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.module = ModuleType("a_page_of_the_docs")
        program = folder / ".bin" / "qcompiler"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m qcompiler "$@"\n')
        program.chmod(0o755)

    def rerun(self, text: str) -> str:
        """The page with its current outputs."""
        sys.modules[self.module.__name__], schemes = self.module, dict(SCHEMES)
        linecache.cache[self.name] = (len(text), None, text.splitlines(True), self.name)
        try:
            return BLOCK.sub(self._run, text)
        finally:
            sys.modules.pop(self.module.__name__)
            for step in [step for step, kind in PASSES.items() if kind.__module__ == self.module.__name__]:
                del PASSES[step]
            for scheme in SCHEMES.keys() - schemes:
                del SCHEMES[scheme]

    def _run(self, block: re.Match[str]) -> str:
        code = block["code"]
        if block["open"] == "```sh":
            printed = self._shell(code)
        else:
            line = block.string.count("\n", 0, block.start("code"))
            printed = self._python("\n" * line + code, block["open"] == "```python gpu")
        output = "\n".join(row.rstrip() for row in printed.strip("\n").split("\n"))
        shown = f"```text\n{output}\n```\n" if block["shown"] else ""
        return f"{block['open']}\n{code}{block['close']}\n{block['gap']}{shown}"

    def _python(self, code: str, needs_gpu: bool) -> str:
        compiled, printed = compile(code, self.name, "exec"), io.StringIO()
        if not needs_gpu or (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)):
            with contextlib.redirect_stdout(printed), contextlib.chdir(self.folder):
                exec(compiled, self.module.__dict__)
        return printed.getvalue()

    def _shell(self, code: str) -> str:
        path = os.pathsep.join([str(self.folder / ".bin"), os.environ["PATH"]])
        done = subprocess.run(
            ["sh", "-euc", code], cwd=self.folder, env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{code}\n{done.stdout}"
        return done.stdout


@pytest.mark.timeout(120)
@pytest.mark.parametrize("path", PAGES, ids=[path.name for path in PAGES])
def test_the_code_on_a_page_prints_the_outputs_on_the_page(path: Path, tmp_path: Path) -> None:
    if missing := [name for name in EXTRAS.get(path.name, ()) if find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}: pip install -e '.[mlir,iree]'")
    page = path.read_text(encoding="utf-8")
    today = Page(path.name, tmp_path).rerun(page)
    if knobs.current().update:
        path.write_text(today, encoding="utf-8")
    else:
        assert today == page


def test_code_that_no_test_runs_is_marked() -> None:
    strange = {
        f"{path.name}: {mark}"
        for path in PAGES
        for mark in FENCE.findall(path.read_text(encoding="utf-8"))
        if mark.split()[0] in ("python", "py", *SHELLS) and mark not in MARKS
    }
    assert not strange, f"known are {MARKS}"


def test_a_wrong_output_and_a_failing_block_are_noticed(tmp_path: Path) -> None:
    page = (
        "<!-- python\nx = 6\n-->\n\n```python\nprint(x * 7)\n```\n\n```text\n41\n```\n\n```python no-run\n1 / 0\n```\n"
        "```sh\nqcompiler opt -p dead-code nowhere.qir 2>&1 | cut -c -5\n```\n\n```text\nnothing\n```\n"
    )
    run = Page("page.md", tmp_path)
    assert run.rerun(page) == page.replace("41", "42").replace("nothing", "error")
    with pytest.raises(ZeroDivisionError):
        run.rerun("```python\n1 / 0\n```\n")
    with pytest.raises(AssertionError, match="no such file or dir"):
        run.rerun("```sh\nLC_ALL=C ls no_such_file | tr A-Z a-z; ls no such file or dir\n```\n")
    with pytest.raises(SyntaxError):
        run.rerun("```python gpu\n1 +\n```\n")


def test_the_ir_reference_matches_the_tables() -> None:
    page = ROOT / "docs/ir-reference.md"
    if knobs.current().update:
        page.write_text(ir_reference(), encoding="utf-8")
    assert page.read_text(encoding="utf-8") == ir_reference(), "rewrite it with QCOMPILER_UPDATE=1"
