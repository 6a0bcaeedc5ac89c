"""`qcompiler generate`: streams text from a language model.

Text goes to standard output; the number of tokens per second goes to standard error.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import qcompiler
from qcompiler.cli.huggingface import no_bars
from qcompiler.cli.meshes import load_artefact, mesh_of
from qcompiler.compiler.arguments import AUTO
from qcompiler.compiler.model import CompiledModel
from qcompiler.decoding.decoder import Decoder
from qcompiler.errors import InputError
from qcompiler.program.folder_kinds import is_artefact

NOTHING = "none"
"""Scheme name for a model that is not quantized."""

FOR_FOLDERS = ("scheme", "kv_cache", "max_length", "mesh", "sharding")


def run(options: argparse.Namespace) -> int:
    """Generates an answer to each prompt."""
    prompts = [sys.stdin.read() if text == "-" else text for text in options.prompt]
    llm = _decoder(options)
    if options.save is not None:
        llm.save(options.save)
    settings = {
        "max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "top_k": options.top_k,
        "top_p": options.top_p, "min_p": options.min_p, "repetition_penalty": options.repetition_penalty,
        "stop": options.stop, "ignore_eos": options.ignore_eos,
    }  # fmt: skip
    for number, text in enumerate(prompts):
        prompt: Any = [{"role": "user", "content": text}] if options.chat else text
        print(_answered(llm, prompt, {**settings, "seed": options.seed + number}), file=sys.stderr)
    return 0


def _decoder(options: argparse.Namespace) -> Decoder:
    """The decoder in an artefact, or compiled from a folder."""
    path = Path(options.model)
    if not is_artefact(path):
        scheme = None if options.scheme == NOTHING else options.scheme or AUTO
        with no_bars():
            return qcompiler.decoder(
                path,
                scheme=scheme,
                kv_cache=options.kv_cache,
                max_batch=1,
                max_length=options.max_length,
                device=options.device,
                progress=not options.quiet,
                mesh=mesh_of(options),
                sharding=options.sharding,
            )
    if given := [name for name in FOR_FOLDERS if getattr(options, name) is not None]:
        raise InputError(
            f"--{given[0].replace('_', '-')} has no effect on an artefact",
            got=options.model,
            need="the folder of the model that it was made from",
        )
    loaded = load_artefact(path, device=options.device, trust=options.trust)
    if isinstance(loaded, CompiledModel):
        raise InputError(
            "the artefact is a compiled model without a cache",
            got=options.model,
            need="a decoder",
            fix="Make one: qcompiler.decoder(folder).save(artefact), or generate --save DIR.",
        )
    return loaded  # type: ignore[no-any-return]  # load returns one of both


def _answered(llm: Decoder, prompt: Any, settings: dict[str, Any]) -> str:
    """Prints an answer while it is generated; returns a sentence about its speed."""
    started = time.perf_counter()
    stream = llm.stream(prompt, **settings)
    first = 0.0
    for piece in stream:
        first = first or time.perf_counter()
        print(piece, end="", flush=True)
    ended = time.perf_counter()
    print()
    count = len(stream.answer.ids)
    return speed(count, (first or ended) - started, ended - started)


def speed(count: int, first: float, whole: float) -> str:
    """A sentence about `count` tokens, the first text of which came after `first` of `whole` seconds."""
    tokens = "1 token" if count == 1 else f"{count} tokens"
    return f"{tokens} in {whole:.2f} s, the first text after {first:.2f} s: {count / whole:.1f} tokens per second"
