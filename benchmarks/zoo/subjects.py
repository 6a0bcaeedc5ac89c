"""The registry of the zoo: named builders of tiny models with random weights, grouped by family.

    @subject("plain", "lstm-head")
    def lstm_head() -> Subject:
        return Recurrent(), lambda rows, length: {"x": torch.randn(rows, length, 64)}

Configurations follow the real architectures, scaled down: hidden size 64 to 128, one or two layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

Call = dict[str, Any]
"""Keyword arguments of one call of a model."""

Inputs = Callable[[int, int], Call]
"""(rows, length) -> a call. A model without a sequence, or with fixed image sizes, ignores the length."""

Subject = tuple[nn.Module, Inputs]
"""A model and its example calls."""

VOCABULARY = 160

TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1,
}  # fmt: skip
"""Options that most language model configurations accept; a configuration stores unknown names unchanged."""

FAMILIES = (
    "language", "mixtures", "encoders", "encoder_decoders", "vision", "speech", "multimodal", "diffusion",
    "state_space", "caches", "adapters", "plain",
)  # fmt: skip
"""The modules of this folder that register subjects, in the order of the table."""


@dataclass(frozen=True)
class Entry:
    """One architecture of the zoo."""

    family: str
    name: str
    build: Callable[[], Subject]


ZOO: dict[str, Entry] = {}
"""The entries by name; complete after `load_families`."""


def add(family: str, name: str, build: Callable[[], Subject]) -> None:
    """Registers one architecture; raises ValueError if the name is taken."""
    if name in ZOO:
        raise ValueError(f"two subjects of the zoo are called {name!r}")
    ZOO[name] = Entry(family, name, build)


def subject(family: str, name: str) -> Callable[[Callable[[], Subject]], Callable[[], Subject]]:
    """Registers the decorated builder with `add`."""

    def register(build: Callable[[], Subject]) -> Callable[[], Subject]:
        add(family, name, build)
        return build

    return register


def load_families() -> dict[str, Entry]:
    """All entries by name, ordered by family."""
    for family in FAMILIES:
        import_module(f"benchmarks.zoo.{family}")
    return ZOO


def pretrained(model: str, config: str, **options: Any) -> nn.Module:
    """A model of transformers with random weights, from the names of its class and its configuration class.

    Options that are None are omitted.
    """
    hf = import_module("transformers")
    given = {name: value for name, value in options.items() if value is not None}
    built: nn.Module = getattr(hf, model)(getattr(hf, config)(**given))
    return built


def tokens(rows: int, length: int) -> Call:
    """Token ids, excluding special tokens."""
    return {"input_ids": torch.randint(3, VOCABULARY - 3, (rows, length))}


def masked(rows: int, length: int) -> Call:
    """Token ids with a padding mask: the first row ends early."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, length - length // 3 :] = 0
    return {**tokens(rows, length), "attention_mask": mask}


def images(size: int, channels: int = 3, name: str = "pixel_values") -> Inputs:
    """Batches of square images of a fixed size."""
    return lambda rows, _: {name: torch.randn(rows, channels, size, size)}


def hidden(width: int, name: str = "x") -> Inputs:
    """Sequences of vectors."""
    return lambda rows, length: {name: torch.randn(rows, length, width)}


def first_tensor(output: Any) -> Tensor:
    """The first tensor that a model returns."""
    tensor: Tensor = output if isinstance(output, Tensor) else next(iter(output.values()))
    return tensor
