"""Numbers whose products add up exactly, so that matmuls of any size and order give equal bits."""

import torch
from torch import Tensor


def integers(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Integers from -7 to 7. Each tile, block and row has a 7, so that FP8 scales, 7 / 448, are powers of two."""
    found = torch.randint(-7, 8, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    found[:, ::32] = 7.0
    return found


def powers_of_two(size: int, seed: int) -> Tensor:
    """Factors 0.5, 1 and 2 of the columns of `integers`, with the largest where these are 7."""
    found = 2.0 ** torch.randint(-1, 2, (size,), generator=torch.Generator().manual_seed(seed))
    found[::32] = 2.0
    return found
