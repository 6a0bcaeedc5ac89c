"""Runs checkpoints in vLLM, and compares its numbers with qcompiler's.

    make engine                                       or: python examples/engine_check.py FOLDER

FOLDER was written by `engine_reference.py`, by default in FP32. For each scheme,

- each quantized layer, on the input that it gets in vLLM, must give the bits of qcompiler's operators on the tensors in
  the folder;
- log-probabilities of tokens must differ from qcompiler's by less than the quantization changes them, and perplexities
  by less than 2%.

The whole model cannot have equal bits: vLLM's own kernels for norms, activations and attention round differently, and a
rounding may move an activation to the next code. Each layer multiplies such differences; after a few layers they are as
large as the error of the quantization. A change of the embeddings by 1e-7 has the same effect in qcompiler alone.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler.checkpoints import Checkpoint, read
from qcompiler.numerics import torch_dtype

TOLERANCE = 0.02
"""Relative difference of perplexities."""

SETTINGS = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip
"""One process, and 1 GiB for the cache."""


class Comparison:
    """Compares each call of a quantized layer with qcompiler's operators.

    Attributes:
        layers: The number of parts of layers that were compared.
        wrong: The names of parts whose bits differ.
    """

    def __init__(self, folder: Path) -> None:
        self.files: Checkpoint = read(folder)
        self.layers, self.wrong = 0, list[str]()

    def watch(self, model: torch.nn.Module) -> None:
        """Compares from now on."""
        for name, module in model.named_modules():
            if hasattr(module, "quantized_parts"):
                path, _, last = name.rpartition(".")
                merged = module.quant_config.packed_modules_mapping.get(last, [last])
                names = [f"{path}.{part}.weight" for part in merged]
                module.register_forward_hook(lambda _, given, out, names=names: self.compare(names, given[0], out))

    def compare(self, names: Sequence[str], x: Tensor, out: Any) -> None:
        """Compares the output of one layer, all of whose parts read `x`."""
        y = out[0] if isinstance(out, tuple) else out
        parts = [self.wanted(name, x) for name in names]
        for name, want, got in zip(names, parts, y.split([part.shape[-1] for part in parts], -1), strict=True):
            self.layers += 1
            if not torch.equal(want, got):
                self.wrong.append(name)

    def wanted(self, name: str, x: Tensor) -> Tensor:
        """The output of one part, from the tensors in the folder."""
        assert self.files.schemes is not None
        spec, weight = self.files.schemes.spec(name.removesuffix(".weight")), self.files.quantized(name)
        assert spec is not None and weight.x_scale is None
        ops, block = torch.ops.qcompiler, list(spec.x.block)
        x_q, x_s = ops.quantize(x, block, torch_dtype(spec.x.element), spec.x.profile, "row_major")
        y: Tensor = ops.scaled_linear(x_q, x_s, weight.codes, weight.scale, None, block, list(weight.block), x.dtype)
        return y


def main() -> int:
    """Prints a row for each scheme; returns 1 if one of them differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    reference = json.loads((options.folder / "reference.json").read_text(encoding="utf-8"))
    passed = [
        report(scheme, wanted, reference["float"], measured(options.folder / scheme, reference))
        for scheme, wanted in reference["schemes"].items()
    ]
    return int(not all(passed))


def measured(folder: Path, reference: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of the texts, greedy answers, and the comparison of the layers."""
    from vllm import LLM, SamplingParams  # after the environment is set

    # vLLM would run FP32 models in bf16. Hooks run in eager mode only.
    llm = LLM(str(folder), max_model_len=512, dtype=reference["dtype"], enforce_eager=True, enable_prefix_caching=False)
    texts, questions = ([{"prompt_token_ids": ids} for ids in reference[key]] for key in ("texts", "questions"))
    length = max(len(answer) for wanted in reference["schemes"].values() for answer in wanted["answers"])
    scored = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0)
    outputs = llm.generate(texts, scored, use_tqdm=False)
    answers = llm.generate(questions, SamplingParams(max_tokens=length, temperature=0), use_tqdm=False)
    comparison = Comparison(folder)
    llm.apply_model(comparison.watch)
    llm.generate(texts[:1], SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
    return {
        "logprobs": [
            [step[token].logprob for step, token in zip(out.prompt_logprobs[1:], out.prompt_token_ids[1:], strict=True)]
            for out in outputs
        ],
        "answers": [list(out.outputs[0].token_ids) for out in answers],
        "comparison": comparison,
    }


def report(scheme: str, wanted: dict[str, Any], in_float: list[list[float]], found: dict[str, Any]) -> bool:
    """Prints the comparison of one scheme; returns whether it passes."""
    ours, theirs = perplexity(wanted["logprobs"]), perplexity(found["logprobs"])
    change, difference = (distance(wanted["logprobs"], other) for other in (in_float, found["logprobs"]))
    layers: Comparison = found["comparison"]
    equal = [
        f"{next((at for at, (one, other) in enumerate(zip(*pair, strict=False)) if one != other), len(pair[0]))}"
        for pair in zip(wanted["answers"], found["answers"], strict=True)
    ]
    passes = abs(theirs / ours - 1) < TOLERANCE and difference < change and layers.layers > 0 and not layers.wrong
    print(
        f"{scheme}: {layers.layers - len(layers.wrong)} of {layers.layers} linears have equal bits; perplexity "
        f"{theirs:.3f} in vLLM, {ours:.3f} in qcompiler, {perplexity(in_float):.3f} in float; mean difference of "
        f"log-probabilities {difference:.3f}, by the quantization {change:.3f}; tokens of the answers before the first "
        f"difference {', '.join(equal)}: {'passes' if passes else 'FAILS'}",
        flush=True,
    )
    return passes


def distance(one: list[list[float]], other: list[list[float]]) -> float:
    """The mean absolute difference."""
    pairs = list(zip(chain(*one), chain(*other), strict=True))
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def perplexity(logprobs: list[list[float]]) -> float:
    """exp of the mean negative log-probability."""
    flat = list(chain(*logprobs))
    return math.exp(-sum(flat) / len(flat))


if __name__ == "__main__":
    sys.exit(main())
