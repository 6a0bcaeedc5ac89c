"""Artefacts of Hugging Face models: their output classes, caches, tied weights and experts come back."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qcompiler
from qcompiler import ArtefactError
from qcompiler.artefact.strict_json import Node
from qcompiler.artefact.structures import structure_from_json

transformers = pytest.importorskip("transformers")

TINY = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 320,
}  # fmt: skip
IDS = torch.randint(0, 320, (2, 7), generator=torch.Generator().manual_seed(0))

# transformers' own, when a causal language model is traced with a cache
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY, num_key_value_heads=2, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config).eval()


def mixtral() -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=4)
    return transformers.MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("make", [llama, mixtral])
def test_outputs_come_back_as_their_class(make: Callable[[], Any], tmp_path: Path) -> None:
    fast = qcompiler.compile(make(), example_kwargs={"input_ids": IDS})
    fast.save(tmp_path / "model")
    loaded = qcompiler.load(tmp_path / "model", verify=True)
    assert type(loaded.config) is type(fast.config) and loaded.config.to_dict() == fast.config.to_dict()
    assert (loaded.dtype, loaded.device) == (fast.dtype, fast.device) == (torch.float32, torch.device("cpu"))
    got, want = loaded(input_ids=IDS[:1]), fast(input_ids=IDS[:1])
    assert type(got) is type(want) and torch.equal(got.logits, want.logits)
    assert loaded(IDS).keys() == want.keys()


def test_a_cache_goes_in_and_comes_out(tmp_path: Path) -> None:
    model = llama()
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache, use_cache=True)
    call: dict[str, Any] = {"input_ids": IDS[:, :1], "use_cache": True}
    fast = qcompiler.compile(model, example_kwargs={**call, "past_key_values": copy.deepcopy(cache)})
    fast.save(tmp_path / "model")
    loaded = qcompiler.load(tmp_path / "model")
    got = loaded(**call, past_key_values=copy.deepcopy(cache))
    want = fast(**call, past_key_values=copy.deepcopy(cache))
    assert torch.equal(got.logits, want.logits) and type(got) is type(want)
    mine, theirs = got.past_key_values, want.past_key_values
    assert type(mine) is transformers.DynamicCache and mine.get_seq_length() == theirs.get_seq_length() == 8
    pairs: list[tuple[Tensor, Tensor]] = [(a.keys, b.keys) for a, b in zip(mine.layers, theirs.layers, strict=True)]
    assert all(torch.equal(a, b) for a, b in pairs)
    again = loaded(**call, past_key_values=mine)
    assert again.past_key_values.get_seq_length() == 9


@pytest.mark.parametrize(
    "state",
    [
        [["_t", "obj"], ["p", "subprocess:Popen"], ["s", {"dict": []}]],
        [["_t", "type"], ["p", "os:system"]],
        [["_t", "map"], ["p", "transformers.cache_utils:DynamicCache"], ["v", {"dict": []}]],
        [["_t", "obj"], ["p", "transformers.cache_utils:logger.manager"], ["s", {"dict": []}]],
        [["_t", "dtype"], ["n", "load"]],
    ],
)
def test_the_state_of_a_cache_names_no_class_of_others(state: list[Any], tmp_path: Path) -> None:
    """transformers makes an object of each class that the state names."""
    context = {"dict": [["_t", "obj"], ["p", "transformers.cache_utils:DynamicCache"], ["s", {"dict": [["layers", [
        {"dict": state}]]]}]]}  # fmt: skip
    structure = {"class": {"name": "transformers.cache_utils:DynamicCache", "context": context, "children": []}}
    with pytest.raises(ArtefactError, match="need a context that names only classes of transformers"):
        structure_from_json(Node(structure, "", tmp_path))
