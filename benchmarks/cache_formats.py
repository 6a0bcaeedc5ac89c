"""What each format of a key-value cache costs SmolLM2-135M-Instruct: perplexity, bytes, and the error of each layer.

    python benchmarks/cache_formats.py --folder SmolLM2         without --folder: the model that `make chat` installs

Nothing but the cache is quantized. The texts are docstrings of Python's standard library; static scales come from other
docstrings. The error of a row is the error of the logits if only this layer's keys, or values, are quantized.
"""

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import torch
import transformers
from torch import Tensor

import qcompiler

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
import smollm2

FORMATS = (None, "fp8", "fp8_static", "int8", "int8_static")
WORST = 4
"""Rows of the error attribution in the table."""


def main() -> None:
    """Measures each format, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a Hugging Face folder instead of the installed model")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda on a Hopper GPU")
    parser.add_argument("--tokens", type=int, default=smollm2.WINDOW, help="tokens of each text, at most 256")
    parser.add_argument("--texts", type=int, default=6, help="number of texts, for the perplexity and for calibration")
    parser.add_argument("--attributed", type=int, default=64, help="tokens of a text whose error is attributed")
    options = parser.parse_known_args()[0]  # the harness reads --out
    model, tokenizer = smollm2.load(options.folder, options.device)
    found = [ids[:, : options.tokens] for ids in smollm2.windows(tokenizer, 2 * options.texts)]
    texts, others = found[: options.texts], found[options.texts :]
    rows: list[dict[str, Any]] = [
        {"cache": "transformers", "perplexity": smollm2.perplexity(model, texts), "bytes per token": None}
    ]
    layers: list[dict[str, Any]] = []
    for kv_cache in FORMATS:
        llm = decoder(model, tokenizer, kv_cache, [ids.to(options.device) for ids in others])
        name = kv_cache or "the model's dtype"
        found_perplexity = smollm2.perplexity(llm.for_transformers(), texts)
        rows.append(
            {"cache": name, "perplexity": found_perplexity, "bytes per token": llm.memory.cache // llm.step.capacity}
        )
        print(*rows[-1].values(), flush=True)
        if kv_cache is not None:
            layers += worst_layers(llm, name, texts[0][:, : options.attributed])
    facts = {
        "weights": str(model.dtype), "device": options.device, "texts": str(len(texts)), "tokens": str(options.tokens),
        "calibration texts": str(len(others)), "attributed tokens": str(options.attributed),
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    harness.report("cache-formats", "Formats of the key-value cache: SmolLM2-135M-Instruct", rows, facts, digits=3)
    harness.report(
        "cache-formats-layers", "Worst layers of each cache format: SmolLM2-135M-Instruct", layers, facts, digits=1
    )


def decoder(model: Any, tokenizer: Any, kv_cache: str | None, others: Sequence[Tensor]) -> qcompiler.Decoder:
    """The model with a cache in this format, and without other quantization."""
    static = kv_cache is not None and kv_cache.endswith("static")
    calls = [{"input_ids": ids, "position_ids": torch.arange(ids.shape[1], device=ids.device)[None]} for ids in others]
    return qcompiler.decoder(
        model, scheme=None, kv_cache=kv_cache, max_batch=1, max_length=others[0].shape[1], tokenizer=tokenizer,
        calibration=calls if static else None, progress=False,
    )  # fmt: skip


def worst_layers(llm: qcompiler.Decoder, name: str, ids: Tensor) -> list[dict[str, Any]]:
    """The rows of the error attribution that change the logits most."""
    report = qcompiler.attribute_error(llm, ids, outputs=True)
    rows = sorted(report.caches, key=lambda row: row.outputs or 0)[:WORST]
    return [
        {"cache": name, "module": row.module, "part": row.part, "logits dB": row.outputs, "own dB": row.own}
        for row in rows
    ]


if __name__ == "__main__":
    main()
