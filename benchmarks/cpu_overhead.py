"""The slowdown of the CPU target, which is meant for numerics, relative to the float model on the demo's batches.

    python benchmarks/cpu_overhead.py [--out FOLDER] [--scheme fp8_tile] [--sentences 400]
    python benchmarks/cpu_overhead.py --model FOLDER        a causal language model instead of the demo's model

Each model is called five times in a row, in two alternating blocks. Alternating single calls would evict the weights of
both models from the last-level cache.
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
    """CPU time of one call: with one thread, other processes do not count."""
    start = time.process_time()
    model(**batch)
    return time.process_time() - start


def compared(model: torch.nn.Module, fast: torch.nn.Module, batch: dict[str, Any]) -> dict[str, float]:
    """Milliseconds per call of each model: the minimum of two blocks of five calls each."""
    times = {"float ms": float("inf"), "quantized ms": float("inf")}
    for key, each in [("quantized ms", fast), ("float ms", model)] * 2:
        seconds(each, batch)
        times[key] = min(times[key], *(1e3 * seconds(each, batch) for _ in range(5)))
    return times | {"ratio": times["quantized ms"] / times["float ms"]}


def embedding_rows(sentences: int, scheme: str) -> list[dict[str, Any]]:
    model, batches = embed.load(sentences, "cpu")
    fast = qcompiler.compile(model, scheme=scheme, example_kwargs=dict(batches[0]))
    found = [
        {"tokens": "x".join(map(str, batch["input_ids"].shape))} | compared(model, fast, dict(batch))
        for batch in batches
    ]
    middle = {key: statistics.median(row[key] for row in found) for key in ("float ms", "quantized ms", "ratio")}
    return [{"tokens": "median"} | middle, found[0], found[len(found) // 2], found[-1]]


def language_rows(folder: str, scheme: str) -> list[dict[str, Any]]:
    model = qcompiler.checkpoints.load_model(folder)
    ids = torch.randint(5, model.config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(0))
    fast = qcompiler.compile(model, scheme=scheme, example_inputs=(ids[:, :16],))
    model.config.use_cache = False  # like the captured graph
    return [
        {"tokens": f"1x{tokens}"} | compared(model, fast, {"input_ids": ids[:, :tokens]}) for tokens in (1, 16, 64, 256)
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    parser.add_argument("--sentences", type=int, default=400)
    parser.add_argument("--scheme", default="fp8_tile")
    parser.add_argument("--model", help="the folder of a language model, instead of the demo's embedding model")
    options = parser.parse_args()
    sys.argv = [sys.argv[0], "--out", str(options.out)]  # the harness parses only --out
    torch.set_num_threads(1)
    with torch.no_grad():
        if options.model is None:
            rows, name = embedding_rows(options.sentences, options.scheme), "all-MiniLM-L6-v2"
        else:
            rows, name = language_rows(options.model, options.scheme), Path(options.model).name
    facts = {
        "model": name, "scheme": options.scheme, "threads": str(torch.get_num_threads()),
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip
    file = (
        "cpu-overhead" if options.model is None else f"cpu-overhead-{name.lower()}-{options.scheme.replace('_', '-')}"
    )
    harness.report(file, f"The target cpu against the float model, {name}, CPU time, best of 5 calls", rows, facts)


if __name__ == "__main__":
    main()
