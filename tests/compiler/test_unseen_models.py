"""Models that no pass was written for: each pass keeps its declared effect, and results stay close to the float model.

Each is captured once and run at other sizes, batch 1 and one position among them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional

import qcompiler
from qcompiler.pass_manager.instruments import CheckChanged, Validate

# transformers compiles some losses with torch.jit.script when it is imported, which newer Pythons call deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")

TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96,
    "max_position_embeddings": 40, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class Experts(nn.Module):
    """A mixture of experts that gathers the rows of each and adds them up again."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 4, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 64)
        weights, chosen = self.gate(rows).softmax(-1).topk(2, -1)
        total = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            row, rank = torch.where(chosen == index)
            total.index_add_(0, row, expert(rows[row]) * weights[row, rank, None])
        return total.reshape(x.shape)


class Weights(nn.Module):
    """Weights that are not parameters: normalized, merged, cut, joined, transposed, buffers, and plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(64, 130))
        self.down, self.up = nn.Parameter(torch.randn(64, 8) / 8), nn.Parameter(torch.randn(8, 130) / 8)
        self.register_buffer("table", torch.randn(200, 130) / 11, persistent=False)
        self.plain = torch.randn(7, 64) / 8
        self.table: Tensor

    def forward(self, x: Tensor) -> dict[str, Any]:
        merged = functional.linear(x, self.normed.weight + (self.down @ self.up).t() * 0.5)
        joined = torch.cat([self.table[150:], self.table[:3]])
        hidden = functional.linear(torch.relu(merged), joined)
        return {"hidden": hidden, "rest": (merged @ self.table[:64].t(), None, [x @ self.plain.t()])}


class Rotary(nn.Module):
    """Causal attention under autocast, with rotary embeddings as complex numbers, padded to whole blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        padded = functional.pad(x, (0, 0, 0, -length % 4))
        with torch.autocast("cpu", torch.bfloat16):
            q, k, v = self.qkv(padded).view(batch, -1, 3, 4, 16).permute(2, 0, 3, 1, 4).float()
        angles = torch.outer(torch.arange(padded.shape[1]).float(), 0.5 ** torch.arange(8).float())
        turn = torch.polar(torch.ones_like(angles), angles)
        q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (8, 2))) * turn).flatten(-2) for t in (q, k))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        joined: Tensor = self.out(y.transpose(1, 2).flatten(-2))
        return joined[:, :length]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(48, 64, batch_first=True), nn.Linear(64, 24)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.lstm(x)[0][:, -1])


def decoder(name: str, **changes: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**{**TINY, **changes}))


def tokens(rows: int, length: int) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 90, (rows, length))}


def hidden(rows: int, length: int) -> dict[str, Any]:
    return {"x": torch.randn(rows, length, 64)}


Case = tuple[Callable[[], nn.Module], Callable[[int, int], dict[str, Any]], list[tuple[int, int]]]

SIZES = [(2, 7), (1, 1), (3, 20)]
MODELS: dict[str, Case] = {
    "encoder-fast-path": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 96, batch_first=True), 1),
        lambda rows, length: {"src": torch.randn(rows, length, 64)},
        SIZES,
    ),
    "experts": (Experts, hidden, SIZES),
    "weights": (Weights, hidden, SIZES),
    "rotary": (Rotary, hidden, SIZES),
    "lstm": (Recurrent, lambda rows, length: {"x": torch.randn(rows, length, 48)}, [(2, 7), (1, 7)]),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 24)),
        lambda rows, length: {"input": torch.randn(rows, 3, 8, 8)},
        [(2, 0), (1, 0)],
    ),
    "bf16-hidden-states": (
        lambda: decoder("Llama")().to(torch.bfloat16),
        lambda rows, length: {**tokens(rows, length), "labels": None, "output_hidden_states": True},
        SIZES,
    ),
    "mistral-window": (decoder("Mistral", sliding_window=6), tokens, SIZES),
    "gpt-oss": (decoder("GptOss", head_dim=16, num_local_experts=4, sliding_window=6), tokens, SIZES),
    "t5": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, vocab_size=96)
        ),
        lambda rows, length: {
            **tokens(rows, length),
            "decoder_input_ids": torch.randint(3, 90, (rows, max(1, length // 2))),
        },
        SIZES,
    ),
}
CAUSAL = ("bf16-hidden-states", "mistral-window", "gpt-oss")


def floats(output: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf.double() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


FIXED = pytest.mark.filterwarnings("ignore:capture fixes sizes. dimension 1 of x:qcompiler.errors.CaptureWarning")
"""An LSTM is one operation, whose sequence torch fixes."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[FIXED] * (name == "lstm")) for name in MODELS])
def test_model(name: str) -> None:
    build, call, sizes = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    fast = qcompiler.compile(model, instruments=[Validate(), CheckChanged()])
    for rows, length in sizes:
        inputs = call(rows, length)
        with torch.no_grad():
            got, want = fast(**inputs), model(**inputs, **({"use_cache": False} if "input_ids" in inputs else {}))
        assert type(got) is type(want)
        pairs = list(zip(floats(got), floats(want), strict=True))
        assert pairs and all(0 < (a - b).norm() < 0.1 * b.norm() or torch.equal(a, b) for a, b in pairs), (rows, length)
        if name in CAUSAL and length > 1:
            other = inputs["input_ids"].clone()
            other[:, -1] = 92
            assert torch.equal(fast(**{**inputs, "input_ids": other})[0][:, :-1], got[0][:, :-1])
    assert fast.report.quantized
    assert all(row.reason for row in fast.report.skipped)
