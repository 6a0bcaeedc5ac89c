"""Converts torch tensors to numpy arrays and back, including element types that numpy lacks."""

from typing import Any

import torch

from codegen.mlir.extras import load

NAMELESS: dict[torch.dtype, tuple[str, torch.dtype]] = {
    torch.bfloat16: ("bfloat16", torch.int16),
    torch.float8_e4m3fn: ("float8_e4m3fn", torch.uint8),
    torch.float8_e5m2: ("float8_e5m2", torch.uint8),
    torch.float8_e8m0fnu: ("float8_e8m0fnu", torch.uint8),
}
"""Types that numpy lacks: the name in ml_dtypes, and a torch type of the same size that numpy has."""


def to_array(tensor: torch.Tensor) -> Any:
    """The array of a tensor."""
    plain = tensor.detach().cpu().contiguous()
    if tensor.dtype not in NAMELESS:
        return plain.numpy()
    name, bits = NAMELESS[tensor.dtype]
    return plain.view(bits).numpy().view(getattr(load("ml_dtypes", "iree"), name))


def to_tensor(array: Any) -> torch.Tensor:
    """A tensor with a copy of the array."""
    for dtype, (name, bits) in NAMELESS.items():
        if str(array.dtype) == name:
            plain = array.view(f"{'u' if bits is torch.uint8 else ''}int{8 * array.itemsize}")
            return torch.from_numpy(plain.copy()).view(dtype)
    return torch.from_numpy(array.copy())
