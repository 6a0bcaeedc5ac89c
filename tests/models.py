"""Tiny models that several test files use."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Mlp(nn.Module):
    """Sizes that 128 does not divide, and optional inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(200, 136), nn.Linear(136, 64)

    def forward(self, x: Tensor, scale: float | None = None, *, shift: Tensor | None = None) -> Tensor:
        """f32[rows, 200] -> f32[rows, 64]."""
        y: Tensor = self.down(torch.relu(self.up(x)))
        y = y if shift is None else y + shift
        return y if scale is None else y * scale


class SiluMlp(nn.Module):
    """Two linears of 8 and 16 columns; too small to be quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 8)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.fc2(functional.silu(self.fc1(x)))


class ResidualMlp(nn.Module):
    """The MLP of a transformer block: norm, two linears, residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(256)
        self.up, self.down = nn.Linear(256, 384), nn.Linear(384, 256)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(functional.gelu(self.up(self.norm(x))))
        return x + y
