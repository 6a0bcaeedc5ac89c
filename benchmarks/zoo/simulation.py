"""FP8 tiles simulated in a float model, without qcompiler: the error caused by the format alone.

    with Fp8Tiles(weights):        # the parameters whose matmuls are to be quantized
        simulated = model(x)       # x in tiles of 1 x 128 and w in blocks of 128 x 128, multiplied in FP32

The simulation shares no code with the passes, the numerics or the kernels: it rounds operands of the matmuls that torch
dispatches while the model itself runs. It recognizes a weight by its memory, also through views and through arithmetic
that involves only weights.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LARGEST = 448.0  # the largest finite float8_e4m3fn

OPERANDS = {
    "aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0, "aten::baddbmm": 1, "aten::_grouped_mm": 0,
    "transformers::grouped_mm_fallback": 0,
}  # fmt: skip
"""Matmul -> the position of its left operand; the right one follows."""


def rounded(x: Tensor, rows: int, columns: int) -> Tensor:
    """`x` `[..., M, K]` in FP32, after a round-trip through e4m3 with one scale for each block of the last two axes."""
    height, width = x.shape[-2:]
    padded = functional.pad(x.float(), (0, -width % columns, 0, -height % rows))
    blocks = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    amax = blocks.abs().amax((-3, -1), keepdim=True)
    scale = torch.where(amax > 0, amax, 1.0) / LARGEST
    codes = (blocks / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    back: Tensor = (codes.float() * scale).flatten(-2).flatten(-3, -2)
    return back[..., :height, :width]


class Fp8Tiles(TorchDispatchMode):
    """Rounds both operands of each matmul with one of `quantized`.

    Args:
        constants: All parameters and buffers that no call changes.
        quantized: The weights whose matmuls are quantized.

    Attributes:
        reached: Memory addresses of the quantized weights that a matmul has read.
    """

    def __init__(self, constants: Iterable[Tensor], quantized: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.wanted = {address(tensor) for tensor in quantized}
        self.reached: set[int] = set()
        self._sources = {address(tensor): frozenset([address(tensor)]) for tensor in constants}
        self._alive: list[Tensor] = []  # keeps tensors alive so that their addresses are not reused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        position = OPERANDS.get(func._schema.name)
        if position is not None and (found := self._weights(args[position + 1])):
            self.reached |= found
            output = self._multiplied(func, position, args, kwargs)
        else:
            output = func(*args, **kwargs)
        self._follow(output, (args, kwargs))
        return output

    def _weights(self, right: Tensor) -> frozenset[int]:
        """The quantized weights that the right operand is computed from."""
        return self._sources.get(address(right), frozenset()) & self.wanted

    def _multiplied(self, func: Any, position: int, args: Any, kwargs: Any) -> Tensor:
        dtype = args[position].dtype
        operands = rounded(args[position], 1, 128), rounded(args[position + 1], 128, 128)
        before = [each.float() if isinstance(each, Tensor) else each for each in args[:position]]
        product: Tensor = func(*before, *operands, *args[position + 2 :], **kwargs)
        return product.to(dtype)

    def _follow(self, output: Any, inputs: Any) -> None:
        """Records values computed from constants alone."""
        given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        known = [self._sources.get(address(tensor)) for tensor in given]
        if given and None not in known:
            union = frozenset().union(*(each for each in known if each is not None))
            self._sources |= {address(tensor): self._sources.get(address(tensor), union) for tensor in made}
            self._alive += made
        else:
            for tensor in made:  # an in-place write over a constant value
                self._sources.pop(address(tensor), None)


def address(tensor: Tensor) -> int:
    """The address of a tensor's storage, the same for all of its views."""
    return tensor.untyped_storage().data_ptr()
