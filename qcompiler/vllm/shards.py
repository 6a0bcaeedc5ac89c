"""Scales of merged layers and of their shares on several GPUs, cut along the blocks of a format; needs no vLLM.

    qkv_proj = [q_proj; k_proj; v_proj]      each part has its own blocks, the last of which may be partial
    a share  = rows or columns of each part  must begin at a block

A GEMM needs blocks that begin at multiples of the block size. `join` makes that so, once, after loading:

    widths 576, 192, 192; blocks of 128  ->  640, 256, 256, with rows of zeros; the result keeps the columns of 576, …
    one scale for each part              ->  one scale for each row
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler.errors import QCompilerError
from qcompiler.ir.formats import ALL, Block

Spans = tuple[tuple[int, int], ...]
"""Start and end of ranges of columns."""


@dataclass(frozen=True)
class Joined:
    """The weight of a merged layer as one matrix with regular blocks.

    Attributes:
        codes: `[N, K]`; N is larger than the sum of the widths if there are rows of zeros.
        scale: FP32, in the shape of `numerics.scale_shape` for `block`.
        block: Rows and columns that share a scale.
        kept: The columns of the result that belong to the layer; None for all of them.
    """

    codes: Tensor
    scale: Tensor
    block: Block
    kept: Spans | None = None


def blocks_in(size: int, block: int) -> int:
    """The number of blocks along an axis; the last may be partial."""
    return 1 if block == ALL else -(-size // block)


@dataclass(frozen=True)
class Share:
    """One axis of a layer on one GPU.

    Attributes:
        layer: The name of the layer, for messages.
        axis: "output" or "input" channels.
        size: Channels on one GPU.
        whole: Channels of the part in the files.
        block: Channels that share a scale.
    """

    layer: str
    axis: str
    size: int
    whole: int
    block: int

    @property
    def is_cut(self) -> bool:
        """Whether shares of this size begin inside blocks."""
        return self.size != self.whole and self.block != ALL and self.size % self.block != 0


def cut_error(share: Share, layers: Sequence[str]) -> QCompilerError:
    """The error about a share that begins inside a block.

    Args:
        share: The share.
        layers: Names in the files of all layers that need another scheme.
    """
    kinds = dict.fromkeys(layer.rpartition(".")[2] for layer in layers)
    overrides = ", ".join(f'"*.{kind}": "fp8_row"' for kind in kinds)
    return QCompilerError(
        f"tensor parallelism would cut '{share.layer}' inside a block",
        got=f"{share.size} of {share.whole} {share.axis} channels on each GPU",
        need=f"a multiple of {share.block}",
        fix=f"Use fewer GPUs, or a scheme without blocks for these layers: overrides={{{overrides}}}.",
    )


def check_loaded(name: str, scale: Tensor) -> None:
    """Raises QCompilerError if a scale has NaN, which it was initialized with."""
    if torch.isnan(scale).any():
        raise QCompilerError("the files lack a scale, or it is not a number", got=f"'{name}'", need="finite numbers")


def share_of(scale: Tensor, rows: int, row_share: int, columns: int, column_share: int) -> Tensor:
    """The scales of one share: `[rows, columns]` of the scales in the files.

    An axis that has no more scales than the share is not cut: the layer is whole on each GPU, or one scale spans it.

    Args:
        scale: The scales of one part in the files, `[rows of blocks, columns of blocks]`.
        rows: Scales of the share along the output channels.
        row_share: The index of the share along the output channels.
        columns: Scales of the share along the input channels.
        column_share: The index of the share along the input channels.

    Raises:
        QCompilerError: The files have fewer scales than needed.
    """
    down = 0 if scale.shape[0] == rows else rows * row_share
    across = 0 if scale.shape[1] == columns else columns * column_share
    if down + rows > scale.shape[0] or across + columns > scale.shape[1]:
        need = f"at least {[down + rows, across + columns]}"
        raise QCompilerError("a scale does not fit the layer that reads it", got=[*scale.shape], need=need)
    return scale[down : down + rows, across : across + columns]


def split(layer: str, scale: Tensor, widths: Sequence[int], block: int) -> list[Tensor]:
    """The scales of each part of a layer that is merged in the files.

    Args:
        layer: The name of the layer, for the message.
        scale: The scales of the whole matrix in the files.
        widths: Rows of each part in the files.
        block: Rows that share a scale.

    Raises:
        QCompilerError: A part begins inside a block of the matrix.
    """
    if len(widths) == 1 or block == ALL:
        return [scale] * len(widths)
    if any(width % block for width in widths[:-1]):
        raise QCompilerError(
            f"the parts of '{layer}', which is one matrix in the files, do not begin at blocks",
            got=f"parts of {', '.join(map(str, widths))} rows",
            need=f"multiples of {block}",
            fix=f'Use a scheme without blocks: overrides={{"*.{layer.rpartition(".")[2]}": "fp8_row"}}.',
        )
    return list(scale.split([blocks_in(width, block) for width in widths]))


def join(codes: Tensor, scale: Tensor, widths: Sequence[int], block: Block) -> Joined:
    """Makes the blocks of a merged weight regular; exact.

    Args:
        codes: `[sum of widths, K]`.
        scale: The scales of all parts, one below the other.
        widths: Rows of each part.
        block: Rows and columns that share a scale in each part.
    """
    rows, columns = block
    if len(widths) == 1 or rows == 1 or (rows != ALL and all(width % rows == 0 for width in widths[:-1])):
        return Joined(codes, scale, block)
    if rows == ALL:
        times = torch.tensor(widths, device=scale.device)
        return Joined(codes, scale.repeat_interleave(times, 0), (1, columns))
    padded = [blocks_in(width, rows) * rows for width in widths]
    wide = torch.zeros((sum(padded), codes.shape[1]), dtype=torch.uint8, device=codes.device)
    kept: list[tuple[int, int]] = []
    start = 0
    for part, size in zip(codes.view(torch.uint8).split(list(widths)), padded, strict=True):
        kept.append((start, start + len(part)))
        wide[start : start + len(part)] = part
        start += size
    return Joined(wide.view(codes.dtype), scale, block, tuple(kept))


def spread(bias: Tensor, joined: Joined) -> Tensor:
    """A bias of one number for each kept column, with zeros for the others."""
    if joined.kept is None:
        return bias
    wide = bias.new_zeros(len(joined.codes))
    parts = bias.split([end - start for start, end in joined.kept])
    for (start, end), part in zip(joined.kept, parts, strict=True):
        wide[start:end] = part
    return wide
