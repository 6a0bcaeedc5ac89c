"""Layers that tensor parallelism would cut inside a block, found from sizes in the files; needs no vLLM.

model.layers.0.mlp.down_proj [576, 1536] in blocks of 128, "rowwise", 8 GPUs  ->  192 input channels on each GPU: cut

Transformers has a style for each layer of an architecture: "colwise" splits the output channels, "rowwise" the input
channels. Where its styles also gather values, or are absent, vLLM may split another axis: workers check them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qcompiler.checkpoints.layer_schemes import LayerSchemes
from qcompiler.checkpoints.readers import MERGED
from qcompiler.vllm.shards import Share, cut_error

AXES = {"colwise": 0, "rowwise": 1}
"""Style -> the axis of a weight `[N, K]` that is split."""


@dataclass(frozen=True)
class Split:
    """How vLLM splits a model.

    Attributes:
        gpus: The number of GPUs.
        styles: Pattern of the names of layers in a model without its head, such as `layers.*.mlp.up_proj` -> style.
        heads: Key and value heads of a layer. If these are fewer than the GPUs, several GPUs hold the same head.
        head_size: Channels of a key head.
    """

    gpus: int
    styles: Mapping[str, str]
    heads: int
    head_size: int


def check_cuts(shapes: Mapping[str, tuple[int, ...]], schemes: LayerSchemes, split: Split) -> None:
    """Raises QCompilerError if a share of a quantized layer would begin inside a block.

    Args:
        shapes: Full name of a quantized layer -> the shape of its codes, `[N, K]`.
        schemes: The schemes of the layers.
        split: How the layers are split.
    """
    cuts = [*_cuts(shapes, schemes, split)]
    if cuts:
        raise cut_error(cuts[0], _with_merged([cut.layer for cut in cuts]))


def _cuts(shapes: Mapping[str, tuple[int, ...]], schemes: LayerSchemes, split: Split) -> Iterator[Share]:
    styles = [(_matcher(pattern), AXES[style]) for pattern, style in split.styles.items() if style in AXES]
    for layer, shape in shapes.items():
        axis = next((axis for matcher, axis in styles if matcher.fullmatch(layer)), None)
        spec = schemes.spec(layer)
        if axis is None or spec is None or shape[axis] % split.gpus:  # vLLM itself refuses an uneven split
            continue
        found = Share(
            layer, ("output", "input")[axis], _size(shape[axis], axis, split), shape[axis], spec.w.block[axis]
        )
        if found.is_cut:
            yield found


def _size(whole: int, axis: int, split: Split) -> int:
    """Channels on one GPU. If heads are fewer than GPUs, a layer as wide as all heads counts as keys or values."""
    if axis == 0 and split.heads < split.gpus and whole == split.heads * split.head_size:
        return split.head_size
    return whole // split.gpus


def _matcher(pattern: str) -> re.Pattern[str]:
    return re.compile(r"(?:.*\.)?" + r"\d+".join(map(re.escape, pattern.split("*"))))


def _with_merged(layers: list[str]) -> list[str]:
    """The layers, with those that vLLM merges with them, which need the same scheme."""
    found: dict[str, None] = {}
    for layer in layers:
        path, dot, last = layer.rpartition(".")
        group = next((group for group in MERGED if last in group), (last,))
        found |= dict.fromkeys(f"{path}{dot}{name}" for name in group)
    return [*found]
