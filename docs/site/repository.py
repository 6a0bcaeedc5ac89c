"""Which files of the repository are the site: mkdocs calls these functions while it builds.

mkdocs takes its pages from one folder. Here they keep their places in the repository, README.md beside docs/, so that
each link that works there works on the site, and mkdocs checks it. Results of benchmarks are listed in the navigation
by themselves; any other page must be listed in mkdocs.yml, or the build fails.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
RESULTS = "benchmarks/results"
SHOWN = (".md", ".png", ".csv", ".json")

MARK = re.compile(r"^```(python|sh) (?:gpu|no-run)$", re.MULTILINE)
UNSEEN = re.compile(r"^<!-- python\n.*?^-->\n", re.MULTILINE | re.DOTALL)
"""What a page says to its test alone, see tests/test_docs.py."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the results of benchmarks."""
    results = [{path.stem: path.relative_to(ROOT).as_posix()} for path in sorted((ROOT / RESULTS).glob("*.md"))]
    config.nav = [*(config.nav or []), {"Measurements": results}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The theme's files, and the repository's instead of the one folder's."""
    theme = [file for file in files if not Path(file.abs_src_path or "").is_relative_to(config.docs_dir)]
    ours = [
        File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)) for path in _shown(config)
    ]
    return Files([*theme, *ours])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Blocks without what is only for the tests."""
    return MARK.sub(r"```\1", UNSEEN.sub("", markdown))


def _shown(config: MkDocsConfig) -> Iterator[Path]:
    yield from sorted(ROOT.glob("*.md"))
    for folder in ("docs", RESULTS):
        yield from sorted(path for path in (ROOT / folder).rglob("*.*") if path.suffix in SHOWN)
