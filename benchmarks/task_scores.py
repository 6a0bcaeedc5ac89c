"""lm-eval's scores of SmolLM2-135M-Instruct: transformers, and decoders with several schemes and cache formats.

    make lm-eval                                                  a few questions of two models, and the tests
    .venv/lm-eval/bin/python benchmarks/task_scores.py            the whole table; --folder SmolLM2 for a folder

Both tasks read local files that are made from Python's standard library, so the model has not seen them as tasks:

- `continuations`: which of four second halves continues a sentence of a docstring, all from one module;
- `docstrings`: the perplexity of a byte in docstrings of modules.
"""

import argparse
import math
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import harness
import torch
from local_tasks import continuations, local_task

import qcompiler

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
import smollm2

Model = tuple[str, str | None, str | None]
"""A name, a scheme, and a format of the cache."""

TRANSFORMERS: Model = ("transformers", None, None)
MODELS: tuple[Model, ...] = (
    ("none", None, None), ("fp8_tile", "fp8_tile", None), ("fp8_tile", "fp8_tile", "fp8"),
    ("int8_row", "int8_row", None), ("int8_row", "int8_row", "int8"),
)  # fmt: skip
QUICK = (("fp8_tile", "fp8_tile", "fp8"),)
TEXT_BYTES = 900
LONGEST = 512
"""Tokens of a question or a text, at most."""


def main() -> None:
    """Evaluates each model, and writes the table unless `--quick` is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a Hugging Face folder instead of the installed model")
    parser.add_argument("--questions", type=int, default=120)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8, help="rows per call")
    parser.add_argument("--quick", action="store_true", help="20 questions and 4 texts, two models, no file")
    options = parser.parse_known_args()[0]  # the harness reads --out
    if options.quick:
        options.questions, options.texts = 20, 4
    model, tokenizer = smollm2.load(options.folder, "cpu")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tasks = local_tasks(Path(folder), options.questions, options.texts)
        for name, scheme, cache in (TRANSFORMERS, *(QUICK if options.quick else MODELS)):
            subject = model
            if name != TRANSFORMERS[0]:
                subject = qcompiler.decoder(
                    model, scheme=scheme, kv_cache=cache, max_batch=options.batch, max_length=LONGEST,
                    tokenizer=tokenizer, progress=False,
                ).for_transformers()  # fmt: skip
            found = scores(subject, tokenizer, tasks, options.batch)
            rows.append({"model": name, "cache": "" if name == TRANSFORMERS[0] else cache or "model's dtype"} | found)
            print(rows[-1], flush=True)
    if not options.quick:
        facts = {
            "weights": str(model.dtype), "questions": str(options.questions), "texts": str(options.texts),
            "device": "cpu", "python": platform.python_version(), "torch": torch.__version__,
            "transformers": version("transformers"), "lm-eval": version("lm-eval"),
        }  # fmt: skip
        harness.report("task-scores", "lm-eval on SmolLM2-135M-Instruct", rows, facts, digits=4)


def scores(model: Any, tokenizer: Any, tasks: Sequence[Any], batch: int) -> dict[str, float]:
    """Accuracy of the multiple choice with its standard error, and the perplexity of a byte, by lm-eval."""
    evaluator, language_models = import_module("lm_eval"), import_module("lm_eval.models.huggingface")
    harness_model = language_models.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=LONGEST)
    found = evaluator.simple_evaluate(model=harness_model, tasks=[*tasks], bootstrap_iters=0)["results"]
    accuracy, count = found["continuations"]["acc_norm,none"], found["continuations"]["sample_len"]
    return {
        "continuations, accuracy": accuracy,
        "standard error": math.sqrt(accuracy * (1 - accuracy) / count),
        "docstrings, perplexity of a byte": found["docstrings"]["byte_perplexity,none"],
    }


def local_tasks(folder: Path, questions: int, texts: int) -> list[Any]:
    """Both tasks, over files that this function writes."""
    asked = [question for question, _ in zip(continuations(), range(questions), strict=False)]
    read = [{"text": text} for text, _ in zip(long_docstrings(), range(texts), strict=False)]
    return [
        local_task(
            folder, "continuations", asked, output_type="multiple_choice", doc_to_text="{{question}}",
            doc_to_choice="choices", doc_to_target="answer", metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
        ),
        local_task(
            folder, "docstrings", read, output_type="loglikelihood_rolling", doc_to_text="",
            doc_to_target="{{text}}", metric_list=[{"metric": "byte_perplexity"}],
        ),
    ]  # fmt: skip


def long_docstrings() -> Iterator[str]:
    """The first `TEXT_BYTES` bytes of long docstrings of modules."""
    for text in smollm2.docstrings():
        if len(text) >= TEXT_BYTES:
            yield text[:TEXT_BYTES]


if __name__ == "__main__":
    main()
