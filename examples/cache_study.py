"""The perplexity and the size of each format of a key-value cache, on a small chat model without other quantization.

    make chat  (once, installs the model)             then: python examples/cache_study.py --folder SmolLM2

The texts are docstrings of Python's standard library. Static scales come from other docstrings. The table is written to
`benchmarks/results/cache-formats.md`.
"""

import argparse
import platform
from pathlib import Path

import chat
import torch
import transformers
from transformers.utils.logging import disable_progress_bar

import qcompiler

FORMATS = (None, "fp8", "fp8_static", "int8", "int8_static")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "cache-formats.md"


def main() -> None:
    """Measures each format, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a Hugging Face folder instead of the installed model")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda on a Hopper GPU")
    parser.add_argument("--tokens", type=int, default=chat.WINDOW, help="tokens of each text, at most 256")
    parser.add_argument("--texts", type=int, default=6, help="number of texts, for the perplexity and for calibration")
    options = parser.parse_args()
    disable_progress_bar()
    model, tokenizer = chat.load(options.folder, options.device)
    found = [ids[:, : options.tokens] for ids in chat.windows(tokenizer, 2 * options.texts)]
    texts, others = found[: options.texts], found[options.texts :]
    rows = [("transformers", chat.perplexity(model, texts), 0)]
    calls = [{"input_ids": ids.to(options.device)} for ids in others]
    for kv_cache in FORMATS:
        llm = qcompiler.decoder(
            model, scheme=None, kv_cache=kv_cache, max_batch=1, max_length=options.tokens, tokenizer=tokenizer,
            calibration=calls if kv_cache is not None and kv_cache.endswith("static") else None, progress=False,
        )  # fmt: skip
        bytes_each = llm.memory.cache // options.tokens
        rows.append((kv_cache or "the model's dtype", chat.perplexity(llm.for_transformers(), texts), bytes_each))
        print(*rows[-1], flush=True)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    lines = [
        f"# Formats of the key-value cache: SmolLM2-135M-Instruct, {model.dtype} weights, no other quantization",
        "",
        f"{versions}; {options.device}. Perplexity over {len(texts)} docstrings of the standard library, the first "
        f"{options.tokens} tokens of each; static scales from {len(others)} other docstrings.",
        "",
        "| cache | perplexity | bytes per token |",
        "| --- | --- | --- |",
        *(f"| {name} | {value:.3f} | {size or ''} |" for name, value, size in rows),
    ]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
