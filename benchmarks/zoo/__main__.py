"""The zoo: many architectures, tiny and random, compiled with fp8_tile for the CPU.

    python -m benchmarks.zoo [--only PATTERN ...] [--timeout SECONDS] [--out FOLDER] [--list]

Each architecture runs in its own process, one at a time, so a crash or a hang does not lose the others. The table in
benchmarks/results is written after each one; --only replaces the rows that it measures. See docs/zoo.md.
"""

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import qcompiler
from benchmarks.zoo.measure import measure
from benchmarks.zoo.subjects import Entry, load_families
from benchmarks.zoo.table import merged, summary, write_results

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
WAITS = 10
"""Wall-clock limit as a multiple of the CPU-time limit: other work may share the machine."""


def main() -> int:
    """Measures the selected architectures; returns 1 if one failed."""
    options = arguments()
    zoo = load_families()
    chosen = selected(zoo.values(), options.only)
    if not chosen:
        print(f"no architecture matches {' '.join(options.only)}; see --list", file=sys.stderr)
        return 2
    if options.list:
        print(*(f"{entry.family}/{entry.name}" for entry in chosen), sep="\n")
        return 0
    torch.set_num_threads(1)  # before the first fork: a child process would lose the thread pool
    warm_up()
    rows = []
    for number, entry in enumerate(chosen, 1):
        row = isolated(entry, options.timeout)
        rows.append(row)
        print(f"[{number}/{len(chosen)}] {line(row)}", flush=True)
        write_results(options.out, merged(options.out, rows, [*zoo]))
    print(summary(rows))
    return int(any(row["status"] not in ("ok", "absent") for row in rows))


def arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo")
    parser.add_argument("--only", nargs="*", default=[], metavar="PATTERN", help="names or families, such as 'bert*'")
    parser.add_argument(
        "--timeout", type=int, default=300, metavar="SECONDS", help="CPU time of each architecture (300)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where the table goes")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    return parser.parse_args()


def selected(entries: Iterable[Entry], patterns: Sequence[str]) -> list[Entry]:
    """The selected architectures, in the order of the patterns."""
    found = [each for pattern in patterns or ["*"] for each in entries if fits(each, pattern)]
    return list(dict.fromkeys(found))


def fits(entry: Entry, pattern: str) -> bool:
    """Whether a pattern matches the name or the family."""
    return fnmatch(entry.name, pattern) or fnmatch(entry.family, pattern)


def warm_up() -> None:
    """Does the common work before forking: imports half of transformers and fills the tables of torch.export."""
    for name in ("exporter_dynamo", "utils"):
        import_module(f"transformers.exporters.{name}")
    qcompiler.compile(torch.nn.Linear(32, 32).eval(), target="cpu", example_inputs=(torch.zeros(2, 32),))


def isolated(entry: Entry, timeout: int) -> dict[str, Any]:
    """The row of one architecture, measured in a forked process, which has everything imported already."""
    row: dict[str, Any] = {"family": entry.family, "name": entry.name}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder, "row.json"), Path(folder, "log.txt")
        process = multiprocessing.get_context("fork").Process(target=child, args=(entry, path, log, timeout))
        process.start()
        process.join(WAITS * timeout)
        waited = process.is_alive()
        if waited:
            process.kill()
            process.join()
        if waited or process.exitcode == -signal.SIGXCPU:
            row |= {"status": "hang", "message": f"not done after {timeout} s of CPU time, or {WAITS} times that"}
        elif path.exists():
            row = json.loads(path.read_text(encoding="utf-8"))
        else:
            text = log.read_text(encoding="utf-8", errors="replace")[-3000:]
            row |= {"status": "crash", "message": f"{text}\nexit code {process.exitcode}"}
    return row | {"seconds": time.perf_counter() - start}


def child(entry: Entry, path: Path, log: Path, timeout: int) -> None:
    """Measures in this process, which prints to `log`, and writes the row to `path`."""
    resource.setrlimit(resource.RLIMIT_CPU, (timeout, timeout + 5))
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    path.write_text(json.dumps(measure(entry)), encoding="utf-8")


def line(row: dict[str, Any]) -> str:
    """One row as a line of progress."""
    text = f"{row['family']}/{row['name']}: {row['status']}"
    if "quantized" in row:
        text += f", {row['quantized']} of {row['matmuls']} quantized, {row['open']} sizes open"
    if "error" in row:
        text += f", error {row['error']:.4f}, simulated {row['simulated']:.4f}"
    if "message" in row:
        text += f"\n    {row['message'].strip().splitlines()[-1]}"
    return f"{text} ({row.get('CPU s', row['seconds']):.0f} s)"


if __name__ == "__main__":
    sys.exit(main())
