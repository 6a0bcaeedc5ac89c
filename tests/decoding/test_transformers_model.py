"""A decoder as a model of transformers: generate, padding, beams, pipelines, and logits of all positions."""

import re
from collections.abc import Callable
from typing import Any

import decoding_models as models
import pytest
import torch
import transformers as hf
from decoding_models import RecomputingStep
from expert_models import SIZES
from torch import Tensor

from qcompiler.decoding.generator import Generator
from qcompiler.decoding.prefixes import common
from qcompiler.decoding.transformers_model import as_transformers
from qcompiler.errors import InputError


class EveryStep(RecomputingStep):
    """The logits of all positions, [B, S, V]."""

    def __call__(
        self, input_ids: Tensor, slots: Tensor, lengths: Tensor, last: Tensor, start: int | None = None
    ) -> Tensor:
        assert not lengths.any()
        return torch.as_tensor(self.model(input_ids).logits)


def wrapped(model: Any, slots: int = 4) -> tuple[Any, RecomputingStep]:
    step = RecomputingStep(model, slots=slots, capacity=40)
    every: Callable[[], Any] = lambda: EveryStep(model, slots=slots, capacity=40)  # noqa: E731  (typed)
    return as_transformers(model.config, Generator(step), every, model.generation_config.to_dict()), step


def padded_batch() -> dict[str, Tensor]:
    ids = torch.tensor([[0, 0, 5, 9, 31], [11, 3, 4, 60, 22], [0, 0, 0, 0, 7]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"repetition_penalty": 1.4}])
def test_generate_equals_the_original(options: dict[str, Any]) -> None:
    model = models.llama()
    other, step = wrapped(model, slots=9)
    wanted = model.generate(**padded_batch(), max_new_tokens=10, do_sample=False, **options)
    assert torch.equal(other.generate(**padded_batch(), max_new_tokens=10, do_sample=False, **options), wanted)
    if not options:
        assert step.calls[1:] == [(3, 1)] * (len(step.calls) - 1), "only new tokens are computed"


def test_the_configuration_of_a_mixture_of_experts() -> None:
    """Its field for the implementation of the experts describes a model that does not run."""
    torch.manual_seed(0)
    model: Any = hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=4))
    other, _ = wrapped(model.eval())
    ids = torch.tensor([[5, 9, 31]])
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(other.generate(ids, max_new_tokens=4, do_sample=False), wanted)
    assert model.config._experts_implementation != "eager", "the original configuration is unchanged"


def test_more_rows_than_slots_and_other_sequences_afterwards() -> None:
    model = models.llama()
    other, _ = wrapped(model, slots=2)
    for ids in (torch.tensor([[5, 9], [7, 8], [3, 4]]), torch.tensor([[5, 10]])):
        wanted = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(other.generate(ids, max_new_tokens=6, do_sample=False), wanted)


def test_logits_of_all_positions_and_the_loss() -> None:
    model = models.llama()
    other, _ = wrapped(model)
    batch = padded_batch()
    kept = batch["attention_mask"].bool()
    got = other(**batch).logits
    torch.testing.assert_close(got[kept], model(**batch).logits[kept])
    assert not got[~kept].any()
    ids = batch["input_ids"][1:2]
    torch.testing.assert_close(other(ids, labels=ids).loss, model(ids, labels=ids).loss)
    torch.testing.assert_close(other(ids, logits_to_keep=1).logits, model(ids).logits[:, -1:])
    torch.testing.assert_close(other(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:])


def test_it_notices_that_the_decoder_wrote_to_the_cache() -> None:
    model = models.llama()
    other, step = wrapped(model)
    ids = torch.tensor([[5, 9, 3]])
    before = other(ids, logits_to_keep=1).logits
    Generator.generate(other._generator, [8, 8, 8], max_new_tokens=3)
    assert torch.equal(other(ids, logits_to_keep=1).logits, before)
    assert step.calls[-1] == (1, 3)


def test_it_has_the_properties_of_the_original() -> None:
    model = models.llama()
    other, _ = wrapped(model)
    assert other.device == torch.device("cpu") and other.dtype == torch.float32 and other.can_generate()
    assert other.config.vocab_size == 64 and other.config is not model.config and not other.training
    assert other.to("cpu") is other
    assert type(other).__name__ == type(model).__name__, "pipelines know the task of a model by its class"


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 0, 1]], "the attention mask hides tokens between others: got row 0"),
        ([[0, 0, 0]], "the decoder cannot hold a row: got 0 tokens in row 0; need 1 to max_length=40"),
        ([[1, 1]], "the attention mask has another shape than the ids: got [1, 2]; need [1, 3]"),
    ],
)
def test_errors(mask: list[list[int]], message: str) -> None:
    other, _ = wrapped(models.llama())
    with pytest.raises(InputError, match=re.escape(message)):
        other(torch.tensor([[5, 9, 3]]), attention_mask=torch.tensor(mask))


def test_common_prefixes() -> None:
    assert [common([1, 2, 3], other) for other in ([], [1], [1, 2, 4], [1, 2, 3, 4])] == [0, 1, 2, 3]
