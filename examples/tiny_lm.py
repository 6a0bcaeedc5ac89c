"""A small trained language model for Python source: a Llama-like decoder with 4.9 million parameters.

    model = load()                                      bf16, from tiny_lm.safetensors beside this file
    perplexity(model, text(held_out=True)[:50_000])     per byte, on source files not used in training

Tokens are bytes. All widths are multiples of 128. `examples/train_tiny_lm.py` trained it.
"""

import copy
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from qcompiler.errors import InputError

WEIGHTS = Path(__file__).with_suffix(".safetensors")
"""The trained weights; their metadata records the training and the loss that it reached."""

CONTEXT = 512
"""The length in bytes of the training windows."""

NOT_READ = (
    "__pycache__", "dist-packages", "idle_test", "site-packages", "test",
    # Generated files: character tables so similar that training on some reveals most of a held-out one, the
    # documentation as one string, and the settings of one build.
    "encodings", "pydoc_data", "_sysconfigdata",
)  # fmt: skip
"""Prefixes of folders and files of the standard library that are excluded from the text."""


@dataclass(frozen=True)
class Config:
    """The sizes of a model; the defaults are the trained model's."""

    vocabulary: int = 256
    hidden: int = 256
    mlp: int = 768
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) in f32, rounded to x's type, times a gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Causal attention; each key and value head serves `heads / kv_heads` query heads."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_size = config.head_size
        width, kv_width = config.heads * config.head_size, config.kv_heads * config.head_size
        self.q = nn.Linear(config.hidden, width, bias=False)
        self.k = nn.Linear(config.hidden, kv_width, bias=False)
        self.v = nn.Linear(config.hidden, kv_width, bias=False)
        self.out = nn.Linear(width, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        y = functional.scaled_dot_product_attention(
            rotated(q, cos, sin), rotated(k, cos, sin), v, is_causal=True, enable_gqa=True
        )
        joined: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return joined


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden, config.mlp, bias=False)
        self.up = nn.Linear(config.hidden, config.mlp, bias=False)
        self.down = nn.Linear(config.mlp, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y


class Layer(nn.Module):
    """Attention, then MLP, each after a norm and with a residual connection."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(config.hidden, config.norm_eps), Attention(config)
        self.mlp_norm, self.mlp = RMSNorm(config.hidden, config.norm_eps), MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class TinyLM(nn.Module):
    """Token ids [batch, sequence] -> logits [batch, sequence, vocabulary] of the next token at each position."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config = config or Config()
        self.embed = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        cos, sin = (table.to(x.dtype) for table in self.rotations(ids.shape[1], ids.device))
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits

    def rotations(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine of position × frequency, f32[length, head_size] each; both halves of a head are equal."""
        steps = torch.arange(0, self.config.head_size, 2, device=device) / self.config.head_size
        positions = torch.arange(length, device=device, dtype=torch.float32)
        angles = positions[:, None] * self.config.rope_base**-steps
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    def get_output_embeddings(self) -> nn.Linear:
        """The vocabulary projection, under the name used by Hugging Face models."""
        return self.lm_head


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., 2021): rotates (x[i], x[i + half]) by the angle of its position."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def load(path: str | os.PathLike[str] = WEIGHTS, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> TinyLM:
    """The trained model, in evaluation mode; the weights are stored in bf16."""
    model = TinyLM().to(device, dtype)
    model.load_state_dict(load_file(path, device))
    return model.eval()


def text(*, held_out: bool) -> Tensor:
    """The source files of this Python's standard library, u8[bytes]: 19 of 20 for training, the others held out.

    A hash of a file's path in the library decides, so all versions of Python hold out the same files. The files are
    in the order of that hash, each after a zero byte.
    """
    library = Path(os.__file__).parent
    files = {
        hashlib.sha256(path.relative_to(library).as_posix().encode()).digest(): path
        for path in library.rglob("*.py")
        if not any(part.startswith(NOT_READ) for part in path.relative_to(library).parts)
    }
    chosen = (files[digest] for digest in sorted(files) if (digest[-1] % 20 == 0) == held_out)
    return tokens(b"".join(b"\0" + path.read_bytes() for path in chosen))


def tokens(source: bytes) -> Tensor:
    """Bytes as token ids, u8[bytes]."""
    return torch.frombuffer(bytearray(source), dtype=torch.uint8)


def windows(ids: Tensor, length: int = CONTEXT) -> tuple[Tensor, Tensor]:
    """The model's inputs and targets, i64[windows, length] each; drops an incomplete last window."""
    count = (len(ids) - 1) // length
    if count < 1:
        raise InputError("the text is too short to predict", got=f"{len(ids)} tokens", need=f"at least {length + 1}")
    ids = ids.long()
    return ids[: count * length].view(count, length), ids[1 : count * length + 1].view(count, length)


@torch.no_grad()
def loss(model: Callable[[Tensor], Tensor], ids: Tensor, *, length: int = CONTEXT, batch: int = 16) -> float:
    """The mean negative log-likelihood of a text, in nats per byte.

    Each window of `length` bytes is read separately, so its first bytes are predicted from little context.

    Args:
        model: Token ids i64[batch, length] -> logits [batch, length, vocabulary]; may be a compiled model.
        ids: The text, on the model's device.
        length: Bytes per window.
        batch: Windows per model call.

    Raises:
        InputError: The text is shorter than one window and the byte after it.
    """
    total = 0.0
    inputs, targets = windows(ids, length)
    for read, wanted in zip(inputs.split(batch), targets.split(batch), strict=True):
        logits = model(read).float()
        total += float(functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"))
    return total / targets.numel()


def perplexity(model: Callable[[Tensor], Tensor], ids: Tensor, *, length: int = CONTEXT, batch: int = 16) -> float:
    """exp of `loss`: the effective number of equally likely next bytes."""
    return math.exp(loss(model, ids, length=length, batch=batch))


def inject_outliers(model: TinyLM, factor: float, channels: Sequence[int]) -> TinyLM:
    """A copy that computes the same function with activations enlarged by `factor` in some channels.

    Large language models have such channels after their norms (Dettmers et al., 2022; Xiao et al., 2023). The gains of
    `channels` in every norm are multiplied by `factor`, and the weight columns that use them are divided by it. If the
    factor is a power of two and no value overflows or underflows, the logits are bit-identical.

    Raises:
        InputError: The model does not have a channel, or the factor cannot be undone.
    """
    hidden = model.config.hidden
    if wrong := [channel for channel in channels if not 0 <= channel < hidden]:
        raise InputError("no such channel", got=wrong[0], need=f"0 to {hidden - 1}")
    if not (math.isfinite(factor) and factor > 0):
        raise InputError("a factor of outliers must be positive and finite", got=factor)
    model, columns = copy.deepcopy(model), sorted(set(channels))
    with torch.no_grad():
        for norm, readers in norms(model):
            norm.weight[columns] *= factor
            for linear in readers:
                linear.weight[:, columns] /= factor
    return model


def norms(model: TinyLM) -> Iterator[tuple[RMSNorm, tuple[nn.Linear, ...]]]:
    """Each norm with all linears that use its output."""
    for layer in model.modules():
        if isinstance(layer, Layer):
            yield layer.attention_norm, (layer.attention.q, layer.attention.k, layer.attention.v)
            yield layer.mlp_norm, (layer.mlp.gate, layer.mlp.up)
    yield model.norm, (model.lm_head,)
