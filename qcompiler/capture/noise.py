"""Monte Carlo arithmetic: runs a model with a random rounding error after each operator.

The resulting change of the outputs shows how far another order of additions, or another kernel, may change them. It
assumes nothing about depth, width or conditioning, and does not modify the model: a dispatch mode perturbs results.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

MOVES = frozenset({
    "_to_copy", "arange", "cat", "clone", "copy", "embedding", "empty", "fill", "flip", "full", "full_like", "gather",
    "index", "index_select", "lift_fresh_copy", "masked_fill", "new_full", "new_zeros", "ones", "ones_like", "repeat",
    "roll", "scalar_tensor", "scatter", "sort", "stack", "topk", "tril", "triu", "where", "zeros", "zeros_like",
    "constant_pad_nd", "max_pool2d_with_indices", "neg", "abs", "relu", "maximum", "minimum", "clamp", "isin",
})  # fmt: skip
"""Operators that do not round: every implementation gives the same bits."""


class RoundingNoise(TorchDispatchMode):
    """While active, each computed entry is off by up to one unit in the last place, at random.

    Args:
        seed: Seed of the noise. It uses separate generators: the model's random numbers are unchanged.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's constructor is untyped
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs one operator and perturbs its results."""
        found = func(*args, **(kwargs or {}))
        schema = func._schema
        keeps_bits = schema.is_mutable or any(returned.alias_info is not None for returned in schema.returns)
        if keeps_bits or func.overloadpacket.__name__ in MOVES:
            return found
        return pytree.tree_map_only(torch.Tensor, self._perturbed, found)

    def _perturbed(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2 or tensor.is_meta:
            return tensor
        exact = torch.float64 if tensor.dtype.itemsize > 2 else torch.float32
        noise = torch.empty_like(tensor, dtype=exact).uniform_(-1, 1, generator=self._generator(tensor.device))
        noise = noise.mul_(torch.finfo(tensor.dtype).eps).add_(1).mul_(tensor)
        return noise.to(tensor.dtype)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]
