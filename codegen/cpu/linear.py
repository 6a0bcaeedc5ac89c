"""A linear with a bf16 weight on a CPU, faster for one row: a decode step of one sequence has no more.

Torch multiplies bf16 matrices by oneDNN, which prepares its operands in blocks. Its product of a matrix and a vector
reads the weight as it is, in two thirds of the time; in FP32 it gains nothing, and in f16 it is slower.
"""

import torch
from torch import Tensor
from torch.nn import functional


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`torch.nn.functional.linear` of `x`, [..., K], and a weight [N, K], up to the order of FP32 additions."""
    # While torch traces, a test of the number of rows would specialize on it.
    if not torch.compiler.is_compiling() and x.numel() == weight.shape[1]:
        return torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], weight.shape[0])
    return functional.linear(x, weight)
