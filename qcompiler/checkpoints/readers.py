"""Checkpoints that other readers reject or misread: transformers 5.24 (tested) and vLLM (from its sources).

vLLM merges q, k and v, and gate and up, into one weight each. Every part must begin at a block: vLLM rejects other
sizes, or applies scales to the wrong rows. The same holds for weights split by tensor parallelism.
Without a GPU, transformers dequantizes block FP8 and derives the block size from the number of scales. For
compressed-tensors, it splits activations into groups, which must be whole.
"""

import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from qcompiler.checkpoints.format import Writer
from qcompiler.checkpoints.quantized_weight import QuantizedWeight
from qcompiler.errors import CheckpointWarning

SHOWN = 8
"""Maximum number of layer kinds in a warning."""

NUMBER = re.compile(r"(?<![^.])\d+(?=\.|$)")

VLLM = "vLLM refuses or misreads them where it merges layers, such as q, k and v, and where it splits them across GPUs"
ROWS = 'compile with scheme="fp8_row" and write the format "compressed-tensors", which then has no blocks'


def warn(writer: Writer, weights: Mapping[str, QuantizedWeight], skipped: Collection[str], stacklevel: int) -> None:
    """Warns about quantized layers that transformers or vLLM cannot read.

    Args:
        writer: The writer of the checkpoint's format.
        weights: Quantized weights by their names in the files.
        skipped: Weights of routers, vocabulary projections and tiny layers, which are quantized only when named.
        stacklevel: As for `warnings.warn`, counted from the caller.
    """
    ragged = {name: weight for name, weight in weights.items() if _is_ragged(weight)}
    if ragged:
        block = list(next(iter(ragged.values())).block)
        sentences = [VLLM, *dict.fromkeys(filter(None, map(writer.why_unread, ragged.values())))]
        warnings.warn(
            f"{len(ragged)} of {len(weights)} quantized layers in this checkpoint have sizes that are not multiples of "
            f"their block {block}: {_listed(ragged)}. {'. '.join(sentences)}. {_advice(ragged)}, or "
            f"{ROWS}.",
            CheckpointWarning,
            stacklevel + 1,
        )
    if named := {name: weight for name, weight in weights.items() if name in skipped}:
        warnings.warn(
            f"{len(named)} of {len(weights)} quantized layers in this checkpoint are routers, vocabulary projections "
            f"or tiny: {_listed(named)}. vLLM builds most such layers without quantization, and then has no place for "
            f"their scales. {_advice(named)}.",
            CheckpointWarning,
            stacklevel + 1,
        )


def _is_ragged(weight: QuantizedWeight) -> bool:
    """Whether a weight ends in a partial block."""
    return any(size % block for size, block in weight.blocked_axes)


def _kinds(weights: Mapping[str, QuantizedWeight]) -> dict[str, list[Any]]:
    """Layer names with `*` for numbers, as in overrides, and the sizes of these layers."""
    kinds: dict[str, list[Any]] = {}
    for name, weight in weights.items():
        sizes = kinds.setdefault(NUMBER.sub("*", name.removesuffix(".weight")), [])
        if (shape := list(weight.codes.shape[-2:])) not in sizes:
            sizes.append(shape)
    return kinds


def _listed(weights: Mapping[str, QuantizedWeight]) -> str:
    kinds = [f"{name} {', '.join(map(str, sizes))}" for name, sizes in _kinds(weights).items()]
    return "; ".join(kinds[:SHOWN]) + (f"; and {len(kinds) - SHOWN} more kinds" if len(kinds) > SHOWN else "")


def _advice(weights: Mapping[str, QuantizedWeight]) -> str:
    """The `compile` argument that skips these layers."""
    first, *others = _kinds(weights)
    return f'Leave them in float, overrides={{"{first}": None{", ..." if others else ""}}}'
