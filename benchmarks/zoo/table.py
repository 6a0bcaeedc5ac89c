"""The result table of the zoo, as Markdown and JSON."""

import json
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from qcompiler.files.replacing import replacing_file

TITLE = "The zoo: architectures compiled with fp8_tile for the CPU"
PACKAGES = ("torch", "transformers", "diffusers", "peft")


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """One sentence: how many architectures compile, and how many stay within the bound."""
    present = [row for row in rows if row["status"] != "absent"]
    compiled, good = [row for row in present if "quantized" in row], [row for row in present if row["status"] == "ok"]
    share = f" ({100 * len(good) / len(present):.1f}%)" if present else ""
    absent = f"; {len(rows) - len(present)} need a package that is not installed" if len(rows) > len(present) else ""
    return (
        f"{len(good)} of {len(present)} architectures{share} compile and stay within twice the simulated error; "
        f"{len(compiled)} compile{absent}"
    )


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table."""
    compiled = "quantized" in row
    measured = "error" in row
    return [
        row["family"].replace("_", " "),
        row["name"],
        row["status"],
        f"{row['open']}" if compiled else "",
        ("fixed" if "other size" in row else "yes") if measured else "",
        f"{row['quantized']} / {row['matmuls']}" if compiled else "",
        f"{row['error']:.4f}" if measured else "",
        f"{row['simulated']:.4f}" if measured else "",
        f"{row['CPU s']:.0f}" if "CPU s" in row else "",
    ]


def merged(folder: Path, rows: Sequence[dict[str, Any]], order: Sequence[str]) -> list[dict[str, Any]]:
    """The new rows, completed from the table in `folder` for names in `order` that were not measured now."""
    path = folder / "zoo.json"
    old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    by_name = {row["name"]: row for row in (*old, *rows)}
    return [by_name[name] for name in order if name in by_name]


def write_results(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes `zoo.md` and `zoo.json`, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    where = ", ".join(f"{name} {version}" for name, version in facts.items())
    header = [
        "family",
        "architecture",
        "status",
        "open sizes",
        "other size",
        "quantized",
        "error",
        "simulated",
        "CPU s",
    ]
    lines = [header, ["---"] * 3 + ["---:"] * 6, *map(cells, rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    text = f"# {TITLE}\n\n{where}\n\n{summary(rows)}.\n\n{table}\n\n{remarks(rows)}"
    write(folder / "zoo.md", text)
    write(folder / "zoo.json", json.dumps({"title": TITLE, "versions": facts, "rows": list(rows)}, indent=1) + "\n")


def version(package: str) -> str:
    """The installed version, or "absent"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def remarks(rows: Sequence[dict[str, Any]]) -> str:
    """The compiler's message for each architecture that did not pass."""
    failed = [row for row in rows if "message" in row]
    if not failed:
        return ""
    lines = [f"- {row['name']}: {row['message'].strip().splitlines()[-1]}" for row in failed]
    return "## Messages\n\n" + "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with replacing_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
