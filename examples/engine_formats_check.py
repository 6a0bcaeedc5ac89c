"""Loads checkpoints in vLLM, and compares the weights that it runs with the files.

    make engine                                       or: python examples/engine_formats_check.py FOLDER

FOLDER was written by `engine_formats.py`. vLLM reads a folder if it loads all codes and scales bit for bit, runs, and
does not quantize weights again. `save_checkpoint` must have refused all other folders, and none of these.
"""

import argparse
import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from engine_check import SETTINGS
from torch import Tensor

from qcompiler.checkpoints import Checkpoint, read

TOKENS = 16

CHANGES = "requantize_with_max_scale"
"""vLLM's function for FP8 with one scale for each tensor. It needs an operator that vLLM for CPUs does not have."""


class Comparison:
    """Compares the parameters of quantized layers with the files, before vLLM changes them for its kernels.

    Attributes:
        equal: The number of weights with the bits of the files.
        wrong: The names of the others.
    """

    def __init__(self, folder: Path) -> None:
        self.files: Checkpoint = read(folder)
        self.equal, self.wrong = 0, list[str]()

    def compare(self, model: torch.nn.Module) -> None:
        """Compares all layers."""
        for name, layer in model.named_modules():
            codes = getattr(layer, "weight", None)
            if codes is None or codes.dtype not in (torch.float8_e4m3fn, torch.int8):
                continue
            for weight, part, scale in parts(name, layer):
                want = self.files.quantized(weight)
                same = torch.equal(part.view(torch.uint8), want.codes.view(torch.uint8))
                if same and torch.equal(scale.reshape(-1), want.scale.float().reshape(-1)):
                    self.equal += 1
                else:
                    self.wrong.append(weight)


def parts(name: str, layer: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The names in the files, codes and scales of the matrices that a layer merges."""
    path, _, last = name.rpartition(".")
    names = layer.quant_config.packed_modules_mapping.get(last, [last])
    widths = getattr(layer, "output_sizes", None) or [layer.weight.shape[0]]
    scales = (layer.weight_scale_inv if hasattr(layer, "weight_scale_inv") else layer.weight_scale).float()
    of_blocks = scales.dim() == 2 and len(scales) < len(layer.weight)
    counts = [-(-width // 128) for width in widths] if of_blocks else widths if len(scales) > len(widths) else [1] * 3
    for at, (part, codes) in enumerate(zip(names, layer.weight.split(widths), strict=True)):
        start = sum(counts[:at])
        yield f"{path}.{part}.weight", codes, scales[start : start + counts[at]]


def main() -> int:
    """Prints a line for each case; returns 1 if one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    failed = 0
    for case in json.loads((options.folder / "cases.json").read_text(encoding="utf-8")):
        result, reads = in_vllm(options.folder / case["folder"], case["ids"])
        passes = (case["refusal"] is None) is reads
        written = "written" if case["refusal"] is None else f"refused: {case['refusal']}"
        print(f"{case['title']}: vLLM: {result}; {written}: {'passes' if passes else 'FAILS'}", flush=True)
        failed += not passes
    return int(failed > 0)


def in_vllm(folder: Path, ids: list[int]) -> tuple[str, bool]:
    """What vLLM makes of a folder, and whether it reads it."""
    from vllm import LLM, SamplingParams  # after the environment is set
    from vllm.model_executor.model_loader import base_loader

    comparison, process = Comparison(folder), base_loader.process_weights_after_loading

    def compare_first(model: Any, *others: Any) -> Any:
        comparison.compare(model)
        return process(model, *others)

    base_loader.process_weights_after_loading = compare_first
    changes = False
    try:
        llm = LLM(str(folder), enforce_eager=True, skip_tokenizer_init=True, max_model_len=2 * TOKENS, max_num_seqs=1,
                  max_num_batched_tokens=2 * TOKENS, enable_prefix_caching=False)  # fmt: skip
        llm.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    except Exception as error:  # of any kind: it is a result
        changes = any(frame.f_code.co_name == CHANGES for frame, _ in walk_tb(error.__traceback__))
        if not changes:
            return f"{type(error).__name__}: {str(error).splitlines()[0]}", False
    finally:
        base_loader.process_weights_after_loading = process
        gc.collect()
    of = len(comparison.files.stored)
    result = f"{comparison.equal} of {of} weights have the bits of the files" + ", and are quantized again" * changes
    return result, comparison.equal == of and not changes


if __name__ == "__main__":
    sys.exit(main())
