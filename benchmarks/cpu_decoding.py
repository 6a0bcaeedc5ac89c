"""Decoding on a CPU: tokens per second of each scheme and cache format, against transformers.

    python benchmarks/cpu_decoding.py --model FOLDER [--out FOLDER] [--threads 2] [--context 64] [--new 32]

Each model generates the same number of tokens after the same prompt, in turns; the best round counts. Transformers runs
its own model in the dtype of its weights over a DynamicCache, greedily, in a loop without its generate().
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
import transformers

import qcompiler
from codegen.cpu.gemm import kept_bytes

SCHEMES = [(None, None), ("fp8_tile", None), ("fp8_tile", "fp8"), ("int8_row", None), ("int8_row", "int8")]
"""Pairs of scheme and cache format."""

ROUNDS = 3

Generate = Callable[[int], None]
"""Generates a number of tokens."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    parser.add_argument("--model", help="the folder of a language model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=32, help="measured tokens")
    options = parser.parse_args()
    if options.model is None:
        print("skipped: it needs --model FOLDER")
        return
    sys.argv = [sys.argv[0], "--out", str(options.out)]  # the harness parses only --out
    torch.set_num_threads(options.threads)
    model = qcompiler.checkpoints.load_model(options.model)
    prompt = torch.randint(5, model.config.vocab_size, (1, options.context), generator=torch.Generator().manual_seed(0))
    subjects: dict[tuple[str, str], Generate] = {("transformers", ""): partial(by_transformers, model, prompt)}
    memory: dict[tuple[str, str], dict[str, Any]] = {}
    for scheme, kv_cache in SCHEMES:
        name, before = (scheme or "none", kv_cache or "model's dtype"), kept_bytes()
        llm = qcompiler.decoder(
            options.model, scheme=scheme, kv_cache=kv_cache, max_batch=1, progress=False,
            max_length=options.context + options.new + 2,
        )  # fmt: skip
        subjects[name] = partial(by_decoder, llm, prompt.tolist())
        subjects[name](1)
        memory[name] = {"weights MB": llm.memory.weights / 1e6, "copies MB": (kept_bytes() - before) / 1e6}
    rates = measured(subjects, options.new)
    rows = [
        {"scheme": name[0], "cache": name[1], "tokens/s": rate, "times transformers": rate / rates["transformers", ""]}
        | memory.get(name, {"weights MB": None, "copies MB": None})
        for name, rate in rates.items()
    ]
    facts = {
        "model": Path(options.model).name, "threads": str(options.threads), "context": str(options.context),
        "new tokens": str(options.new), "cpu": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    title = f"Decoding on a CPU, batch 1, wall time, best of {ROUNDS} rounds in turns"
    harness.report(f"cpu-decoding-{Path(options.model).name.lower()}", title, rows, facts)


def by_transformers(model: Any, prompt: torch.Tensor, new: int) -> None:
    cache, ids = transformers.DynamicCache(config=model.config), prompt
    for _ in range(new):
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)


def by_decoder(llm: Any, prompt: list[list[int]], new: int) -> None:
    llm.generate(prompt, max_new_tokens=new, ignore_eos=True)


def measured(subjects: dict[tuple[str, str], Generate], new: int) -> dict[tuple[str, str], float]:
    """Tokens per second, without the time of the prefill."""
    best = dict.fromkeys(subjects, (float("inf"), float("inf")))
    for _ in range(ROUNDS):
        for name, generate in subjects.items():
            first, whole = seconds(generate, 1), seconds(generate, 1 + new)
            best[name] = min(best[name][0], first), min(best[name][1], whole)
    return {name: new / (whole - first) for name, (first, whole) in best.items()}


def seconds(generate: Generate, new: int) -> float:
    start = time.perf_counter()
    generate(new)
    return time.perf_counter() - start


if __name__ == "__main__":
    with torch.no_grad():
        main()
