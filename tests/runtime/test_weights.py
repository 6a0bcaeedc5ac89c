"""The weights store: lazy, shared between copies, tied by identity, and never in the way of the garbage collector."""

import gc
import weakref

import pytest
import torch

from qcompiler.runtime.weights import Weights


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.other = torch.nn.Linear(4, 4)
        self.register_buffer("kept", torch.zeros(3))
        self.register_buffer("unsaved", torch.ones(2), persistent=False)


def test_from_module_shares_memory_and_finds_every_tensor() -> None:
    model = Tied()
    weights = Weights.from_module(model)
    assert set(weights) == {"embed.weight", "head.weight", "other.weight", "other.bias", "kept", "unsaved"}
    assert weights["other.weight"].data_ptr() == model.other.weight.data_ptr()
    assert not weights["other.weight"].requires_grad and model.other.weight.requires_grad
    assert weights["embed.weight"] is weights["head.weight"]


def test_ties_are_by_identity_not_by_address() -> None:
    model = Tied()
    model.register_buffer("view", model.other.weight.detach())  # the same memory, another tensor
    ties = Weights.from_module(model).ties
    assert ties == dict.fromkeys(("embed.weight", "head.weight"), ("embed.weight", "head.weight"))


def test_nbytes_counts_tied_tensors_once_and_unloaded_ones_not() -> None:
    assert Weights.from_module(Tied()).nbytes == 4 * (10 * 4 + 4 * 4 + 4 + 3 + 2)
    weights = Weights({"lazy": lambda: torch.zeros(8)})
    assert weights.nbytes == 0
    assert weights["lazy"].shape == (8,) and weights.nbytes == 32


def test_a_loader_runs_once_for_all_copies_and_only_when_read() -> None:
    calls: list[int] = []

    def load() -> torch.Tensor:
        calls.append(1)
        return torch.zeros(2)

    weights = Weights({"w": load})
    copy = weights.copy()
    assert "w" in weights and len(weights) == 1 and list(copy) == ["w"] and not calls
    assert copy["w"] is weights["w"] and len(calls) == 1


def test_copies_share_until_they_write() -> None:
    weights = Weights.from_tensors({"a": torch.zeros(2), "b": torch.ones(2)})
    copy = weights.copy()
    assert copy["a"] is weights["a"]
    copy["a"] = torch.full((2,), 7.0)
    del copy["b"]
    assert weights["a"].tolist() == [0, 0] and weights["b"].tolist() == [1, 1]
    assert copy["a"].tolist() == [7, 7] and "b" not in copy


def test_writing_an_entry_unties_it_in_that_store_only() -> None:
    tensor = torch.zeros(2)
    weights = Weights.from_tensors({"a": tensor, "b": tensor, "c": tensor})
    copy = weights.copy()
    copy["a"] = torch.ones(2)
    assert copy.ties == {"b": ("b", "c"), "c": ("b", "c")}
    del copy["b"]
    assert copy.ties == {}
    assert weights.ties["a"] == ("a", "b", "c")


def test_deleting_releases_the_tensor() -> None:
    tensor = torch.zeros(2)
    weights = Weights({"a": tensor})
    ref = weakref.ref(tensor)
    del tensor
    assert ref() is not None
    del weights["a"]
    gc.collect()
    assert ref() is None


def test_the_store_does_not_keep_the_module_alive() -> None:
    model = Tied()
    weights, ref = Weights.from_module(model), weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None and weights["kept"].shape == (3,)


def test_an_unknown_name_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="nope"):
        Weights()["nope"]
