"""`qcompiler bench --decode`: measures the decoding speed of a decoder's artefact on its device."""

import argparse
import time
from typing import Any

import torch

from qcompiler.cli.meshes import load_artefact
from qcompiler.cli.output import print_json, print_table
from qcompiler.decoding.decoder import Decoder
from qcompiler.errors import InputError
from qcompiler.progress import Progress


def run(options: argparse.Namespace) -> int:
    """Measures tokens per second for each number of sequences, and prints a table."""
    progress = Progress(shown=not options.quiet)
    with progress.showing():
        progress.stage("loading")
        llm = load_artefact(options.artefact, trust=options.trust)
        if not isinstance(llm, Decoder):
            raise InputError(
                "the artefact is not a decoder", got=options.artefact, need="one that qcompiler.decoder(…).save wrote"
            )
        progress.stage("measuring")
        rows = [measured(llm, batch, options.context, options.repeats) for batch in options.decode]
    document = {"artefact": options.artefact, "device": str(llm.step.device), "context": options.context,
                "new_tokens": options.repeats, "rows": rows}  # fmt: skip
    if options.json:
        print_json(document)
        return 0
    headings = ("sequences ", "prefill ms ", "ms a token ", "tokens per second ")
    print_table(headings, [[row["sequences"], f"{row['prefill_ms']:.1f}", f"{row['token_ms']:.2f}",
                            f"{row['tokens_per_second']:.1f}"] for row in rows])  # fmt: skip
    print(f"{llm.step.device}; prompts of {options.context} tokens, {options.repeats} new tokens each")
    return 0


def measured(llm: Decoder, batch: int, context: int, new: int) -> dict[str, Any]:
    """The times for `batch` sequences: the prefill up to the first tokens, and each token after that.

    Two runs differ only in their number of new tokens, so that their difference is the time of decoding.
    """
    if batch > llm.step.slots:
        raise InputError("the decoder has fewer slots", got=f"{batch} sequences", need=f"at most {llm.step.slots}")
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(llm.step.vocabulary, (batch, context), generator=generator).tolist()
    llm.generate(prompts, max_new_tokens=2, ignore_eos=True)  # compiles kernels
    first = _seconds(llm, prompts, 1)
    whole = _seconds(llm, prompts, 1 + new)
    token = max(whole - first, 1e-9) / new
    return {"sequences": batch, "prefill_ms": 1e3 * first, "token_ms": 1e3 * token, "tokens_per_second": batch / token}


def _seconds(llm: Decoder, prompts: Any, new: int) -> float:
    started = time.perf_counter()
    llm.generate(prompts, max_new_tokens=new, ignore_eos=True)
    return time.perf_counter() - started
