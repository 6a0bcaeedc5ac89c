"""The documentation site: it builds strictly, contains every page, and loads nothing from other hosts."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("material") is None, reason="needs mkdocs-material: pip install -e '.[docs]'")

CONFIG = "docs/site/mkdocs.yml"
LOADED = re.compile(r"<(?:script|img|iframe)[^>]*\ssrc=[\"']?([^\"'\s>]+)|<link[^>]*\shref=[\"']?([^\"'\s>]+)")
STYLED = re.compile(r"url\([\"']?([^\"')]+)|@import [\"']([^\"']+)")
FOREIGN = re.compile(r"^(?:https?:)?//")


def build(root: Path, site: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(root / CONFIG), "-d", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def site(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(root, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_on_the_site(root: Path, site: Path) -> None:
    pages = [*root.glob("*.md"), *(root / "docs").glob("*.md"), *(root / "benchmarks/results").glob("*.md")]
    assert len(pages) > 30
    for page in pages:
        name = page.relative_to(root).with_suffix(".html").as_posix().replace("README", "index")
        html = (site / name).read_text(encoding="utf-8")
        assert "<!-- python" not in html and "```" not in html, f"a block of {page.name} was not recognized"
        assert not re.search(r"<p>\s*\|", html), f"a table of {page.name} was not recognized"
        assert ("<code>" in html) or ("`" not in page.read_text(encoding="utf-8"))


def test_the_site_loads_nothing_from_other_hosts(site: Path) -> None:
    foreign = set()
    for path in site.rglob("*"):
        if path.suffix in (".html", ".css"):
            pattern = LOADED if path.suffix == ".html" else STYLED
            found = ("".join(match) for match in pattern.findall(path.read_text(encoding="utf-8")))
            foreign |= {f"{path.name}: {address}" for address in found if FOREIGN.match(address)}
    assert not foreign
    assert (site / "search/search_index.json").stat().st_size > 100_000


def test_a_dead_link_and_a_page_missing_from_the_menu_are_errors(root: Path, tmp_path: Path) -> None:
    for folder in ("docs", "benchmarks/results"):
        shutil.copytree(root / folder, tmp_path / folder)
    for page in root.glob("*.md"):
        shutil.copy(page, tmp_path)
    links = ("nowhere.md", "numerics.md#nowhere", "../qcompiler/errors.py", "/docs/numerics.md")
    (tmp_path / "docs/unlisted.md").write_text("# Unlisted\n\n" + " ".join(f"[here]({link})" for link in links))
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    for culprit in ("unlisted.md", *links):
        assert culprit in done.stderr, done.stderr
