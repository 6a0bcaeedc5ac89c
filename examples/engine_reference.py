"""Quantizes the chat model for vLLM, and computes what `engine_check.py` compares with.

    make engine                                       or: python examples/engine_reference.py FOLDER

For each scheme, FOLDER/<scheme> is a checkpoint in qcompiler's own format, and FOLDER/<scheme> as <format> one that
vLLM's own methods read; both have the same codes and scales. FOLDER/reference.json has the
log-probability of each token of some texts, and greedy answers, both computed by qcompiler, and the float model's
log-probabilities.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from chat import QUESTIONS, chat_ids
from smollm2 import load, windows
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

import qcompiler

SCHEMES = ("fp8_tile", "fp8_row", "int8_row")


def main() -> None:
    """Writes the checkpoints and the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="FOLDER")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, metavar="SCHEME")
    parser.add_argument("--new-tokens", type=int, default=24, help="length of an answer")
    parser.add_argument("--windows", type=int, default=3, help="texts whose log-probabilities are compared")
    parser.add_argument("--folder", type=Path, help="a Hugging Face folder instead of the installed model")
    parser.add_argument("--dtype", default="float32", help="float32, in which rounding is small, or bfloat16")
    options = parser.parse_args()

    disable_progress_bar()
    model, tokenizer = load(options.folder, "cpu")
    model = model.to(getattr(torch, options.dtype))
    model.config.dtype = model.dtype
    texts = windows(tokenizer, options.windows)
    questions = [chat_ids(tokenizer, question) for question in QUESTIONS]
    reference: dict[str, Any] = {
        "dtype": options.dtype, "texts": [ids[0].tolist() for ids in texts], "questions": questions,
        "float": [logprobs(model, ids) for ids in texts], "schemes": {},
    }  # fmt: skip
    for scheme in options.schemes:
        print(f"quantizing with {scheme}", flush=True)
        llm = qcompiler.decoder(model, scheme=scheme, max_length=512, tokenizer=tokenizer)
        qcompiler.checkpoints.write(llm, options.output / scheme, "qcompiler", model=model)
        tokenizer.save_pretrained(options.output / scheme)
        reader = llm.for_transformers()
        reference["schemes"][scheme] = wanted = {
            "logprobs": [logprobs(reader, ids) for ids in texts],
            "answers": [llm.generate(ids, max_new_tokens=options.new_tokens) for ids in questions],
        }
        for format in ("fp8",) * (scheme == "fp8_tile") + ("compressed-tensors",):
            name = f"{scheme} as {format}"
            qcompiler.checkpoints.write(llm, options.output / name, format, reader=None, model=model)
            reference["schemes"][name] = wanted
    (options.output / "reference.json").write_text(json.dumps(reference), encoding="utf-8")


@torch.no_grad()
def logprobs(model: Any, ids: Tensor) -> list[float]:
    """The log-probability of each token of a text after the first."""
    shares = model(ids).logits[:, :-1].float().log_softmax(-1)
    found: list[float] = shares.gather(-1, ids[:, 1:, None]).flatten().tolist()
    return found


if __name__ == "__main__":
    main()
