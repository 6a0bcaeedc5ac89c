"""How much slower the CPU target is than the float model, on the demo's batches, which shows numbers and not speed.

    python benchmarks/cpu_overhead.py [--out FOLDER] [--sentences 400]

The median time of a batch of each model, alternately, so that both meet the same neighbours.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import harness
import torch

import qcompiler

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import embed


def seconds(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    start = time.perf_counter()
    model(**batch)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    parser.add_argument("--sentences", type=int, default=400)
    options = parser.parse_args()
    sys.argv = [sys.argv[0], "--out", str(options.out)]  # what the harness understands
    model, batches = embed.load(options.sentences, "cpu")
    fast = qcompiler.compile(model, example_kwargs=dict(batches[0]))
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for each in (model, fast):
            seconds(each, dict(batches[0]))
        for batch in map(dict, batches):
            floats, quantized = zip(*[(seconds(model, batch), seconds(fast, batch)) for _ in range(3)], strict=True)
            rows.append(
                {
                    "tokens": "x".join(map(str, batch["input_ids"].shape)),
                    "float ms": 1e3 * min(floats),
                    "fp8 ms": 1e3 * min(quantized),
                }
            )
    for row in rows:
        row["ratio"] = row["fp8 ms"] / row["float ms"]
    middle = {key: statistics.median(row[key] for row in rows) for key in ("float ms", "fp8 ms", "ratio")}
    facts = {"cores": str(torch.get_num_threads()), "python": platform.python_version(), "torch": torch.__version__}
    rows = [{"tokens": "median"} | middle, rows[0], rows[len(rows) // 2], rows[-1]]
    harness.report(
        "cpu-overhead", "The CPU target against the float model, all-MiniLM-L6-v2, best of 3 a batch", rows, facts
    )


if __name__ == "__main__":
    main()
