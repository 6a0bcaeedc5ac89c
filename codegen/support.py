"""Which quantized matmuls the GPU kernels run, and why not others: pure functions of attributes, without a GPU.

Two families of kernels multiply 8-bit operands; they differ in where scales are applied:

    tiles x blocks   x [1, b] or whole rows, w [128, 128]: a scale inside the sum over K, once every b of K
    rows x rows      x and w [1, -1] or [-1, -1]: the scales factor out of the sum, and are multiplied at its end
"""

from collections.abc import Sequence
from functools import cache

from qcompiler.dialects.kernel import why_no_kernel
from qcompiler.ir import ALL, DType, Format

Block = tuple[int, int]

TILE_COLUMNS = (32, 64, 128, 256, 512)
"""The widths of an activation's tiles, [1, b], that the kernels support."""

WEIGHT_BLOCK: Block = (128, 128)
"""The only block of a weight with scales inside the sum."""

WHOLE_ROWS: tuple[Block, ...] = ((1, ALL), (ALL, ALL))
"""Blocks with one scale for all of K: a token, an output channel, the tensor."""

ELEMENTS = (DType.f8e4m3fn, DType.i8)
"""Element types that the tensor cores multiply."""


@cache
def why_not(x: Format, w: Format) -> str | None:
    """Why the GPU kernels cannot run a scaled linear, in one sentence without a final stop, or None if they can.

    Args:
        x: The format of the activation.
        w: The format of the weight, `[N, K]`.
    """
    return _why_not_formats(x, w) or _why_not_channels(x.block, w.block) or _why_not_blocks(x.block, w.block, x.element)


def is_tiled(w_block: Sequence[int]) -> bool:
    """Whether a matmul that `why_not` accepts has its scales inside the sum over K."""
    return _pair(w_block) == WEIGHT_BLOCK


def _why_not_formats(x: Format, w: Format) -> str | None:
    if x.element is not w.element:
        return f"a matmul needs both operands in one format, here x is {x.element} and w is {w.element}"
    if x.element not in ELEMENTS:
        return f"the kernels multiply {' or '.join(map(str, ELEMENTS))}, not {x.element}"
    return next(filter(None, map(why_no_kernel, (x, w))), None) if x.block[1] != 1 != w.block[1] else None


def _why_not_channels(x: Block, w: Block) -> str | None:
    for name, block in (("an activation", x), ("a weight", w)):
        if block[1] == 1:
            fix = (
                "; use SmoothQuant, which moves it into the weight, or tiles such as [1, 128]"
                if name == "an activation"
                else ""
            )
            return (
                f"the scale of {name} in {list(block)} blocks varies along K, inside the accumulation, "
                f"where no tensor core can apply it{fix}"
            )
    return None


def _why_not_blocks(x: Block, w: Block, element: DType) -> str | None:
    rows = " or ".join(str(list(block)) for block in WHOLE_ROWS)
    if element is DType.i8 and not (x in WHOLE_ROWS and w in WHOLE_ROWS):
        return (
            f"INT8 sums are scaled once, at their end, so x and w need {rows}, here they have {list(x)} and {list(w)}"
        )
    if w == WEIGHT_BLOCK:
        if x in WHOLE_ROWS or (x[0] == 1 and x[1] in TILE_COLUMNS):
            return None
        widths = ", ".join(map(str, TILE_COLUMNS))
        return f"with a weight in [128, 128] blocks, x needs [1, b] with b in {widths}, or {rows}, not {list(x)}"
    if w in WHOLE_ROWS:
        return None if x in WHOLE_ROWS else f"with a weight in {list(w)} blocks, x needs {rows}, not {list(x)}"
    return f"a weight needs [128, 128], {rows}, not {list(w)}"


def _pair(block: Sequence[int]) -> Block:
    rows, columns = block
    return rows, columns
