"""Combines data and assets into one self-contained page.

The content security policy allows only the page's own scripts and styles, by hash, and no connections: names in a
model cannot inject HTML, and the page cannot send data anywhere.
"""

import base64
import hashlib
import html
import json
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from qcompiler.errors import InputError
from qcompiler.files.replacing import not_replaced, replacing_file

LIBRARY, LIBRARY_NAME = "vendor/dagre.min.js", "dagre 3.1.3"
"""Lays out the nodes of a graph: https://github.com/dagrejs/dagre."""

LICENCE, LICENCE_NAME = "vendor/dagre.LICENSE.txt", "MIT licence"

SCRIPTS = (
    "elements.js", "data.js", "hierarchy.js", "layout.js", "canvas.js", "draw.js", "strip.js", "search.js", "panel.js",
    "tables.js", "reports.js", "main.js",
)  # fmt: skip
"""In load order; they share one scope."""

STYLES = ("page.css", "graph.css", "reports.css")


def render_page(title: str, data: dict[str, Any]) -> str:
    """Returns the HTML of the page: valid UTF-8 whatever the names in the data are."""
    style = "\n".join(map(_asset, STYLES))
    library = _asset(LIBRARY)
    script = '(() => {{\n"use strict";\n{}\n}})();'.format("\n".join(map(_asset, SCRIPTS)))
    parts = {
        "title": html.escape(title),
        "policy": _policy(style, library, script),
        "style": style,
        "data": as_script_data(data),
        "credit": f"{LIBRARY_NAME}, {LICENCE_NAME}",
        "licence": html.escape(_asset(LICENCE)),
        "library": library,
        "script": script,
    }
    # Substitute once, over the template only: inserted text is not scanned again.
    page = re.sub(r"@(\w+)@", lambda found: parts[found[1]], _asset("page.html"))
    return page.encode("utf-8", "replace").decode("utf-8")


def write_page(path: "str | os.PathLike[str]", page: str) -> None:
    """Writes a page atomically: other processes see the old file or the new one, never part of one.

    Raises:
        InputError: The file cannot be written.
    """
    target = Path(path)
    try:
        with replacing_file(target) as partial:
            partial.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        need = "the path of a file, in a folder that can be written"
        said = InputError("the report cannot be written", got=f"{target}: {error.strerror or error}", need=need)
        raise not_replaced(said, error, target, len(page.encode())) from error


def as_script_data(data: dict[str, Any]) -> str:
    """Returns JSON that cannot close its script element and that older JavaScript parsers accept."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _policy(style: str, *scripts: str) -> str:
    hashes = " ".join(map(_hash, scripts))
    return f"default-src 'none'; script-src {hashes}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return (files("qcompiler.html") / "static" / name).read_text(encoding="utf-8")
