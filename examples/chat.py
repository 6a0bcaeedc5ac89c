"""The second demo: a small chat model quantized to FP8 tiles, which answers questions beside the float model.

    make chat                                         or: python examples/chat.py --scheme fp8_row --kv-cache fp8

The model is SmolLM2-135M-Instruct (trained weights, installed from a package index as GGUF, which transformers
dequantizes). The demo prints three answers of both models, their perplexity on docstrings of Python's standard library,
the bytes of weights and cache, and tokens per second.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import smollm2
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import qcompiler

QUESTIONS = (
    "What is the capital of France?",
    "Write two sentences about the ocean.",
    "Explain what a compiler does.",
)


def main() -> None:
    """Runs the comparison and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="fp8_tile", help="a quantization scheme; `qcompiler schemes` lists them")
    parser.add_argument("--kv-cache", help="the format of the cache: fp8 or int8 (default: bf16, as in the model)")
    parser.add_argument("--new-tokens", type=int, default=48, help="maximum length of an answer")
    parser.add_argument("--windows", type=int, default=6, help=f"texts of {smollm2.WINDOW} tokens for the perplexity")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda on a Hopper GPU")
    parser.add_argument("--folder", type=Path, help="a Hugging Face folder instead of the installed model")
    options = parser.parse_args()

    disable_progress_bar()
    console = Console()
    model, tokenizer = smollm2.load(options.folder, options.device)
    console.print(f"SmolLM2-135M-Instruct in {model.dtype} on {options.device}, {torch.get_num_threads()} threads")
    started = time.perf_counter()
    with console.status("capturing and compiling"):
        llm = qcompiler.decoder(
            model, scheme=options.scheme, kv_cache=options.kv_cache, max_batch=4, max_length=512, tokenizer=tokenizer
        )
    console.print(f"compiled in {time.perf_counter() - started:.1f} s: {llm.report.summary()}\n")

    speeds: dict[str, list[float]] = {"float": [], "quantized": []}
    answerers: dict[str, Callable[[list[int]], list[int]]] = {
        "float": lambda ids: continued(model, ids, options.new_tokens),
        "quantized": lambda ids: llm.generate(ids, max_new_tokens=options.new_tokens),
    }
    for question in QUESTIONS:
        ids = chat_ids(tokenizer, question)
        console.print(f"[bold]{question}[/bold]")
        for name, answer in answerers.items():
            started = time.perf_counter()
            new = answer(ids)
            speeds[name].append(len(new) / (time.perf_counter() - started))
            console.print(f"{name:>9}: {tokenizer.decode(new, skip_special_tokens=True).strip()}", markup=False)
        console.print()
    with console.status("measuring the perplexity"):
        texts = smollm2.windows(tokenizer, options.windows)
        perplexities = {
            "float": smollm2.perplexity(model, texts),
            "quantized": smollm2.perplexity(llm.for_transformers(), texts),
        }
    console.print(results(speeds, perplexities, model, llm, len(texts)))


def chat_ids(tokenizer: Any, question: str) -> list[int]:
    """The token ids of a chat that asks the model one question."""
    messages = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def continued(model: PreTrainedModel, ids: list[int], new_tokens: int) -> list[int]:
    """The greedy continuation by transformers' own loop and cache."""
    given = torch.tensor([ids], device=model.device)
    out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=new_tokens, do_sample=False)
    return [int(token) for token in out[0, len(ids) :]]


def results(
    speeds: dict[str, list[float]], perplexities: dict[str, float], model: PreTrainedModel, llm: Any, count: int
) -> Table:
    """Both models in one table."""
    table = Table(title="float and quantized")
    for heading in ("", "float", "quantized"):
        table.add_column(heading, justify="left" if not heading else "right")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    tokens = {name: sum(found) / len(found) for name, found in speeds.items()}
    table.add_row(
        f"perplexity, {count} docstrings of {smollm2.WINDOW} tokens",
        *(f"{value:.2f}" for value in perplexities.values()),
    )
    table.add_row("weights", f"{weights / 2**20:.1f} MiB", f"{llm.memory.weights / 2**20:.1f} MiB")
    slots = f"cache of {llm.step.slots} x {llm.step.capacity} tokens"
    table.add_row(slots, "grows with the answer", f"{llm.memory.cache / 2**20:.1f} MiB")
    table.add_row("tokens per second, with prefill", *(f"{value:.1f}" for value in tokens.values()))
    return table


if __name__ == "__main__":
    main()
