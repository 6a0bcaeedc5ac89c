"""Modules of torch, and small architectures written with them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.zoo.subjects import Subject, hidden, images, subject

FAMILY = "plain"
WIDTH, HEADS, INNER = 64, 4, 96


@subject(FAMILY, "mlp")
def mlp() -> Subject:
    """Three layers with sizes that are not multiples of 128."""
    layers = nn.Sequential(nn.Linear(200, 256), nn.GELU(), nn.Linear(256, 72, bias=False), nn.SiLU(), nn.Linear(72, 40))
    return layers, lambda rows, length: {"input": torch.randn(rows, length, 200)}


@subject(FAMILY, "torch-transformer")
def transformer() -> Subject:
    """nn.Transformer, with a causal mask for its target."""
    model = nn.Transformer(WIDTH, HEADS, 2, 2, INNER, batch_first=True)
    return model, lambda rows, length: {
        "src": torch.randn(rows, length, WIDTH),
        "tgt": torch.randn(rows, length // 2, WIDTH),
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(length // 2),
    }


@subject(FAMILY, "torch-encoder")
def encoder() -> Subject:
    """nn.TransformerEncoder with padding."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, batch_first=True, norm_first=True, activation="gelu")

    def call(rows: int, length: int) -> dict[str, Tensor]:
        padding = torch.zeros(rows, length, dtype=torch.bool)
        padding[0, length - 3 :] = True
        return {**hidden(WIDTH, "src")(rows, length), "src_key_padding_mask": padding}

    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), call


class CrossAttention(nn.Module):
    """nn.MultiheadAttention over a memory of another width, with its weights returned."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=48, vdim=48, batch_first=True)

    def forward(self, query: Tensor, memory: Tensor) -> Any:
        return self.attention(query, memory, memory, need_weights=True)


@subject(FAMILY, "torch-cross-attention")
def cross_attention() -> Subject:
    """Queries and keys of different lengths."""
    return CrossAttention(), lambda rows, length: {
        "query": torch.randn(rows, length // 2, WIDTH),
        "memory": torch.randn(rows, length, 48),
    }


class Recurrent(nn.Module):
    """A recurrent network with a head on its last state."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.body = kind(48, WIDTH, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 5))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(x)[0][:, -1])
        return scores


@subject(FAMILY, "lstm-head")
def lstm() -> Subject:
    """The sequence length is fixed: one operation contains the loop over it."""
    return Recurrent(nn.LSTM), lambda rows, _: hidden(48)(rows, 12)


@subject(FAMILY, "gru-head")
def gru() -> Subject:
    """Like the LSTM."""
    return Recurrent(nn.GRU), lambda rows, _: hidden(48)(rows, 12)


class Residual(nn.Module):
    """A residual block of convolutions."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, stride, 1, bias=False), nn.BatchNorm2d(2 * channels), nn.ReLU(),
            nn.Conv2d(2 * channels, 2 * channels, 3, 1, 1, bias=False), nn.BatchNorm2d(2 * channels),
        )  # fmt: skip
        self.short = nn.Conv2d(channels, 2 * channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.short(x))


@subject(FAMILY, "conv-residual")
def residual() -> Subject:
    """Convolutions, global pooling, and a classifier of linear layers."""
    body = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), Residual(16, 2), Residual(32, 2), nn.AdaptiveAvgPool2d(1)]
    head = [nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(), nn.Linear(128, 10)]
    return nn.Sequential(*body, *head), images(32, name="input")


class MixerBlock(nn.Module):
    """Linear layers over tokens, then over channels."""

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.over_tokens = nn.Sequential(nn.Linear(tokens, 48), nn.GELU(), nn.Linear(48, tokens))
        self.over_channels = nn.Sequential(nn.Linear(channels, INNER), nn.GELU(), nn.Linear(INNER, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_tokens(self.first(x).transpose(1, 2)).transpose(1, 2)
        mixed: Tensor = x + self.over_channels(self.second(x))
        return mixed


@subject(FAMILY, "mlp-mixer")
def mixer() -> Subject:
    """MLP-Mixer on patches of an image."""
    patches = nn.Sequential(nn.Conv2d(3, WIDTH, 8, 8), nn.Flatten(2))
    blocks = nn.Sequential(MixerBlock(16, WIDTH), MixerBlock(16, WIDTH))
    return nn.Sequential(patches, _Transposed(), blocks, nn.LayerNorm(WIDTH)), images(32, name="input")


class _Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class GatedExperts(nn.Module):
    """A soft mixture: every expert sees every token, as one einsum over a stack of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.up = nn.Parameter(torch.randn(4, WIDTH, INNER) / 8)
        self.down = nn.Parameter(torch.randn(4, INNER, WIDTH) / 10)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.einsum("bti,eio->beto", x, self.up).relu()
        y = torch.einsum("beto,eoi->beti", inner, self.down)
        joined: Tensor = self.out((y * self.gate(x).softmax(-1).permute(0, 2, 1)[..., None]).sum(1))
        return joined


@subject(FAMILY, "einsum-experts")
def einsum_experts() -> Subject:
    """Stacked matrices stay in float; the layer after them is quantized."""
    return GatedExperts(), hidden(WIDTH)


class Normalized(nn.Module):
    """Weights that the model computes: weight norm, and a sum of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 130))
        self.second = nn.Parameter(torch.randn(WIDTH, 130) / 11)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(torch.relu(self.first(x)), self.second * 0.5)


@subject(FAMILY, "weight-norm")
def normalized() -> Subject:
    """Constants that are folded before they are quantized."""
    return Normalized(), hidden(WIDTH)


class TwoTowers(nn.Module):
    """Dot products of two embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(50, WIDTH), nn.EmbeddingBag(50, WIDTH, mode="mean")
        self.left = nn.Sequential(nn.Linear(WIDTH, 128), nn.ReLU(), nn.Linear(128, 32))
        self.right = nn.Sequential(nn.Linear(WIDTH, 128), nn.ReLU(), nn.Linear(128, 32))

    def forward(self, user: Tensor, bags: Tensor) -> Tensor:
        return functional.normalize(self.left(self.users(user)), dim=-1) @ self.right(self.items(bags)).T


@subject(FAMILY, "two-towers")
def towers() -> Subject:
    """A recommender."""
    return TwoTowers(), lambda rows, length: {
        "user": torch.randint(0, 50, (rows,)),
        "bags": torch.randint(0, 50, (length, 4)),
    }
