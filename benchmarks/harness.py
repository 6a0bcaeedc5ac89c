"""Shared parts of the benchmarks: timing with CUDA graphs, facts about the machine, tables and files.

A time is the median over replays of a graph that holds many launches, so it excludes Python overhead and launch gaps.
Operands are random (zeros run faster) and stay in place, so small operands are read from L2.
"""

import argparse
import json
import re
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from codegen.launching.timing import in_turns
from qcompiler.files.replacing import replacing_file

RESULTS = Path(__file__).parent / "results"


def milliseconds(launch: Callable[[], object], *, replays: int = 7, budget: float = 12.0) -> float:
    """The median time of one call of `launch`, which must only enqueue work on the current CUDA stream.

    Args:
        launch: Called a few times to warm up, then captured.
        replays: Measured replays of the graph.
        budget: Approximate milliseconds of work in one graph.
    """
    return in_turns({"": [launch]}, rounds=replays, budget=budget)[""] / 1e3


def eager(call: Callable[[], object], *, calls: int = 20) -> float:
    """Median milliseconds of single calls, with the device idle before each, including Python launch overhead."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(calls + 3):
        torch.cuda.synchronize()
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return float(statistics.median(times[3:]))


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want||, in FP32."""
    return float((got.float() - want.float()).norm() / want.float().norm())


def machine() -> dict[str, str]:
    """Device, clocks under load (call right after the work) and versions."""
    fields = "name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0"]
    try:
        values = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    except (OSError, subprocess.CalledProcessError):
        values = [torch.cuda.get_device_name()]
    facts = dict(zip(fields.split(","), values, strict=False))
    return facts | {"torch": torch.__version__, "cuda": str(torch.version.cuda), "triton": triton.__version__}


def device() -> str:
    """The prefix of result names: "h200" for an NVIDIA H200."""
    found = re.search(r"[A-Z]+\d+", torch.cuda.get_device_name())
    return found[0].lower() if found else "gpu"


def table(rows: Sequence[dict[str, Any]], digits: int | None = None) -> str:
    """Rows as a Markdown table; the keys of the first row are the header.

    Numbers have `digits` digits after the point, or else as many as their size needs.
    """
    cells = [list(rows[0])] + [[_cell(value, digits) for value in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *lines[1:]])


def _cell(value: Any, digits: int | None) -> str:
    if isinstance(value, float) and digits is not None:
        return f"{value:.{digits}f}"
    if isinstance(value, float):
        return f"{value:.2e}" if abs(value) < 0.01 else f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}"
    return "" if value is None else str(value)


def report(
    name: str, title: str, rows: Sequence[dict[str, Any]], facts: dict[str, str], digits: int | None = None
) -> None:
    """Prints the rows and writes `NAME.json` and `NAME.md` to the folder of `--out`, each atomically."""
    folder = arguments().out
    folder.mkdir(parents=True, exist_ok=True)
    where = ", ".join(f"{key} {value}" for key, value in facts.items())
    text = f"# {title}\n\n{where}\n\n{table(rows, digits)}\n"
    print(text)
    write(folder / f"{name}.json", json.dumps({"title": title, "machine": facts, "rows": list(rows)}, indent=1) + "\n")
    write(folder / f"{name}.md", text)


def gpu_report(name: str, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Like `report`, for GPU times: prefixes the name with the device."""
    report(f"{device()}-{name}", title, rows, machine())


def arguments() -> argparse.Namespace:
    """The options of all benchmarks; a benchmark with more options parses those itself."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file and the table")
    return parser.parse_known_args()[0]


def write(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with replacing_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
