"""`attention.causal` in plain torch: windows, chunks and slopes, also where the length is traced."""

from typing import Any

import torch
from torch import Tensor, nn

from qcompiler.dialects.attention import causal

WINDOW = 6
CHUNK, SLOPES = 5, torch.tensor([0.5, 0.25, 0.01, -0.3])


def operands(length: int) -> list[Tensor]:
    torch.manual_seed(length)
    return [torch.randn(2, heads, length, 8) for heads in (4, 2, 2)]


def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """In FP64, by the definition."""
    query, key, value = query.double(), *(x.double().repeat_interleave(2, 1) for x in (key, value))
    place = torch.arange(query.shape[2])
    distance = place[:, None] - place
    scores = (query @ key.transpose(2, 3) * 0.25).masked_fill((distance < 0) | (distance >= WINDOW), -torch.inf)
    return torch.softmax(scores, -1) @ value


def test_a_window_hides_nothing_of_a_shorter_sequence() -> None:
    for length in (1, WINDOW - 1, WINDOW):
        assert torch.equal(causal(*operands(length), scale=0.25, window=WINDOW), causal(*operands(length), scale=0.25))
    for length in (WINDOW + 1, 17):
        got = causal(*operands(length), scale=0.25, window=WINDOW)
        torch.testing.assert_close(got.double(), reference(*operands(length)), rtol=1e-5, atol=1e-6)


class Windowed(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return causal(query, key, value, scale=0.25, window=WINDOW)


def test_an_exported_window_holds_for_longer_sequences() -> None:
    shapes: Any = ({2: torch.export.Dim.DYNAMIC},) * 3
    exported = torch.export.export(Windowed(), tuple(operands(5)), dynamic_shapes=shapes).module()
    for length in (4, 5, 9, 17):
        torch.testing.assert_close(
            exported(*operands(length)).double(), reference(*operands(length)), rtol=1e-5, atol=1e-6
        )


def biased(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Slopes, and chunks, in FP64, by the definition."""
    query, key, value = query.double(), *(x.double().repeat_interleave(2, 1) for x in (key, value))
    place = torch.arange(query.shape[2])
    distance = place - place[:, None]
    hidden = (distance > 0) | (place // CHUNK != place[:, None] // CHUNK)
    scores = query @ key.transpose(2, 3) * 0.25 + SLOPES.double()[:, None, None] * distance
    return torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ value


class Biased(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return causal(query, key, value, None, SLOPES, scale=0.25, chunk=CHUNK)


def test_slopes_and_chunks_of_known_and_traced_lengths() -> None:
    shapes: Any = ({2: torch.export.Dim.DYNAMIC},) * 3
    exported = torch.export.export(Biased(), tuple(operands(6)), dynamic_shapes=shapes).module()
    for length in (2, 4, 5, 6, 17):
        for model in (Biased(), exported):
            got = model(*operands(length)).double()
            torch.testing.assert_close(got, biased(*operands(length)), rtol=1e-5, atol=1e-6)
