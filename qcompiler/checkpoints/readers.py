"""What transformers 5.24 and vLLM 0.32 cannot read of a checkpoint, or would change.

vLLM merges q, k and v, and gate and up, into one weight each. Every part must begin at a block: vLLM rejects other
sizes, or applies scales to the wrong rows. The same holds for weights split by tensor parallelism. All parts of a
merged weight must be quantized, or none; parts with one FP8 scale each are quantized
again with the largest.
Without a GPU, transformers dequantizes block FP8 and derives the block size from the number of scales. For
compressed-tensors, it splits activations into groups, which must be whole.

`examples/engine_formats.py` loads each kind of checkpoint in both, and compares what they make of it with these checks.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from qcompiler.checkpoints.format import Writer
from qcompiler.checkpoints.quantized_weight import QuantizedWeight
from qcompiler.errors import QCompilerError, did_you_mean
from qcompiler.numerics import ALL

ANY = "any"

SHOWN = 8
"""Maximum number of kinds of layers in a sentence."""

NUMBER = re.compile(r"(?<![^.])\d+(?=\.|$)")

MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of linears that vLLM merges if they are in one module."""

ROWS = 'scheme="fp8_row" and format="compressed-tensors" have no blocks'


@dataclass(frozen=True)
class Written:
    """What a checkpoint contains.

    Attributes:
        writer: The writer of its format.
        weights: Quantized weights by their names in the files.
        plain: Linears that are not quantized.
        named: Weights of routers, vocabulary projections and tiny layers, which are quantized only when named.
    """

    writer: Writer
    weights: Mapping[str, QuantizedWeight]
    plain: Collection[str] = ()
    named: Collection[str] = ()


@dataclass(frozen=True)
class Problem:
    """Weights that a tool does not read as they are.

    Attributes:
        why: The reason, in one sentence without a final period.
        weights: The weights.
        fix: What helps, besides leaving the layers in float.
    """

    why: str
    weights: Mapping[str, QuantizedWeight]
    fix: str | None = None


def check_reader(reader: str | None, written: Written) -> None:
    """Raises QCompilerError if a tool cannot read some layers; the message lists them and says what helps.

    Args:
        reader: "vllm", "transformers", or "any" for both; None checks nothing.
        written: The contents of the checkpoint.
    """
    if reader is None:
        return
    if reader != ANY and reader not in READERS:
        raise QCompilerError(
            "no such reader of checkpoints", got=repr(reader), fix=did_you_mean(reader, [ANY, *READERS])
        )
    wanted = [reader] if reader != ANY else [*READERS]
    problems = [problem for name in wanted if name in written.writer.readers for problem in READERS[name](written)]
    if not problems:
        return
    layers = {name: weight for problem in problems for name, weight in problem.weights.items()}
    rows = "".join(f"\n  {listed(problem.weights)}: {problem.why}" for problem in problems)
    tools = "other tools" if reader == ANY else {"vllm": "vLLM"}.get(reader, reader)
    fixes = [advice(layers), *dict.fromkeys(problem.fix for problem in problems if problem.fix)]
    raise QCompilerError(
        f"{tools} cannot read {len(layers)} of {len(written.weights)} quantized layers, or would change them:{rows}",
        fix=f"{'; or: '.join(fixes)}; or pass reader=None to write the checkpoint regardless.",
    )


def _vllm(written: Written) -> Iterator[Problem]:
    ragged = {name: weight for name, weight in written.weights.items() if _is_ragged(weight)}
    if ragged:
        block = list(next(iter(ragged.values())).block)
        where = "where it merges layers, such as q, k and v, and where it splits them across GPUs"
        yield Problem(
            f"vLLM refuses or misreads sizes that are not multiples of the block {block} {where}", ragged, ROWS
        )
    if named := _these(written.weights, written.named):
        yield Problem(
            "vLLM builds most routers, vocabulary projections and tiny layers without quantization, and then has no "
            "place for their scales",
            named,
        )
    parts = [*_merged(written)]
    torn = {name: written.weights[name] for found, missing in parts if missing for name in found}
    if torn:
        yield Problem("vLLM merges them with layers that are not quantized, and refuses that", torn)
    whole = [found for found, missing in parts if not missing]
    changed = {name: written.weights[name] for found in whole for name in _requantized(written, found)}
    if changed:
        why = "vLLM merges them and quantizes them again with the largest of their scales"
        yield Problem(why, changed, 'scheme="fp8_row" has scales that it does not change')
    others = {name: written.weights[name] for found in whole for name in _unequal_inputs(written, found)}
    if others:
        why = "vLLM merges them and uses the largest of their static activation scales for all"
        yield Problem(why, others, "a scheme with dynamic activation scales, such as fp8_row, has none")


def _transformers(written: Written) -> Iterator[Problem]:
    reasons: dict[str, dict[str, QuantizedWeight]] = {}
    for name, weight in written.weights.items():
        if _is_ragged(weight) and (why := written.writer.why_unread(weight)):
            reasons.setdefault(why, {})[name] = weight
    for why, weights in reasons.items():
        yield Problem(why, weights, ROWS)


READERS: Mapping[str, Callable[[Written], Iterator[Problem]]] = {"vllm": _vllm, "transformers": _transformers}
"""Tool -> the problems that it has with a checkpoint."""


def _merged(written: Written) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    """For each weight that vLLM merges: the quantized parts, and the linears of it that are not quantized."""
    modules = {name.removesuffix(".weight") for name in written.weights}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in modules):
        for group in MERGED:
            parts = [f"{parent}.{part}" if parent else part for part in group]
            found = [f"{part}.weight" for part in parts if part in modules]
            if found:
                yield found, [part for part in parts if part in written.plain]


def _requantized(written: Written, names: Sequence[str]) -> Sequence[str]:
    """The weights if each has one FP8 scale, and these differ. For INT8, vLLM repeats each scale for its rows."""
    weights = [written.weights[name] for name in names]
    if any(weight.block != (ALL, ALL) or not weight.codes.is_floating_point() for weight in weights):
        return ()
    return () if _all_equal([weight.scale for weight in weights]) else names


def _unequal_inputs(written: Written, names: Sequence[str]) -> Sequence[str]:
    """The weights if they have static activation scales that differ."""
    scales = [written.weights[name].x_scale for name in names]
    return () if _all_equal([scale for scale in scales if scale is not None]) else names


def _all_equal(scales: Sequence[Tensor]) -> bool:
    return len({float(scale) for scale in scales}) < 2


def _these(weights: Mapping[str, QuantizedWeight], names: Collection[str]) -> dict[str, QuantizedWeight]:
    return {name: weight for name, weight in weights.items() if name in names}


def _is_ragged(weight: QuantizedWeight) -> bool:
    """Whether a weight ends in a partial block."""
    return any(size % block for size, block in weight.blocked_axes)


def _kinds(weights: Mapping[str, QuantizedWeight]) -> dict[str, list[list[int]]]:
    """Layer names with `*` for numbers, as in overrides, and the sizes of these layers."""
    kinds: dict[str, list[list[int]]] = {}
    for name, weight in weights.items():
        sizes = kinds.setdefault(NUMBER.sub("*", name.removesuffix(".weight")), [])
        if (shape := list(weight.codes.shape[-2:])) not in sizes:
            sizes.append(shape)
    return kinds


def listed(weights: Mapping[str, QuantizedWeight]) -> str:
    """The kinds of layers, with their sizes."""
    kinds = [f"{name} {', '.join(map(str, sizes))}" for name, sizes in _kinds(weights).items()]
    return "; ".join(kinds[:SHOWN]) + (f"; and {len(kinds) - SHOWN} more kinds" if len(kinds) > SHOWN else "")


def advice(weights: Mapping[str, QuantizedWeight]) -> str:
    """The `compile` argument that skips these layers."""
    names = [f'"{name}": None' for name in _kinds(weights)]
    more = ", …" if len(names) > SHOWN else ""
    return f"Leave them in float, overrides={{{', '.join(names[:SHOWN])}{more}}}"
