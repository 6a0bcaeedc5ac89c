"""Decoders of models with windows: rings of the latest positions give the tokens that transformers generates."""

import re
from pathlib import Path
from typing import Any

import decoding_models as models
import pytest
import torch

import qcompiler
from codegen.targets.hopper import HOPPER
from qcompiler.decoding.decoder import Decoder
from qcompiler.decoding.memory import check_fits
from qcompiler.decoding.prefixes import Prefixes
from qcompiler.errors import InputError
from qcompiler.runtime import device
from qcompiler.runtime.device import Target, register

PROMPTS = [[5, 9, 31] * 9, [7, 7], [11, 3, 4, 60, 22, 13, 8], [1], [40, 41, 42, 43] * 5]
NEW, CHUNK = 16, 6
ZERO = torch.zeros(1, dtype=torch.int64)


def made(model: Any, **options: Any) -> Decoder:
    sizes: dict[str, Any] = {"max_batch": 2, "max_length": 64, "max_chunk": CHUNK, "progress": False}
    return qcompiler.decoder(model, **{"scheme": None, **sizes, **options})


def wanted(model: Any) -> list[list[int]]:
    return models.greedy_tokens(model, PROMPTS, NEW)


@pytest.fixture(scope="module")
def gemma() -> tuple[Any, Decoder]:
    model = models.MODELS["gemma3"]()
    return model, made(model)


def test_greedy_tokens_are_those_of_transformers(gemma: tuple[Any, Decoder]) -> None:
    """Prompts of several chunks, and more prompts than slots, so that slots are used again."""
    model, llm = gemma
    assert llm.generate(PROMPTS, max_new_tokens=NEW, ignore_eos=True) == wanted(model)


def test_memory_follows_from_the_windows(gemma: tuple[Any, Decoder]) -> None:
    row = 2 * 2 * (16 + 16) * 4  # slots, heads, key and value of 16 numbers in FP32
    assert gemma[1].memory.cache == (16 + 64) * row, "one layer holds 4 - 1 + 6 positions, rounded up"
    assert gemma[1].step.chunk == 13 and gemma[1].step.capacity == 64


def test_an_artefact_is_the_same_decoder(gemma: tuple[Any, Decoder], tmp_path: Path) -> None:
    _, llm = gemma
    llm.save(tmp_path / "artefact")
    again: Any = qcompiler.load(tmp_path / "artefact")
    assert repr(again.memory) == repr(llm.memory) and again.step.chunk == 13 and again._loop._chunk == CHUNK
    assert again.generate(PROMPTS, max_new_tokens=NEW) == llm.generate(PROMPTS, max_new_tokens=NEW)


def test_a_model_of_transformers_cuts_and_returns(gemma: tuple[Any, Decoder]) -> None:
    """All logits of long rows; greedy and beam search, whose beams return to shorter prefixes."""
    model, other = gemma[0], gemma[1].for_transformers()
    ids = torch.randint(3, 64, (3, 40), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    batch = {"input_ids": ids[:1, :20], "attention_mask": torch.ones(1, 20), "max_new_tokens": 20, "do_sample": False}
    for beams in (1, 2):
        assert torch.equal(other.generate(**batch, num_beams=beams), model.generate(**batch, num_beams=beams))


def test_a_prefix_that_the_ring_has_lost_is_computed_again(gemma: tuple[Any, Decoder]) -> None:
    model, llm = gemma
    prefixes, step = Prefixes(llm.step), llm.step
    ids = torch.randint(3, 64, (50,), generator=torch.Generator().manual_seed(2)).tolist()
    for row in (ids[:10], [*ids[:5], 9], ids[:40], [*ids[:36], 7], [*ids[:20], 8, 9], ids[:21]):
        want = model(torch.tensor([row])).logits[0, -1]
        torch.testing.assert_close(prefixes.last_logits([row])[0], want, rtol=1e-4, atol=1e-4)
    assert step.keeps(5, 10) and step.keeps(36, 40) and not step.keeps(20, 37)


def test_errors_are_attributed_to_caches_of_all_positions(gemma: tuple[Any, Decoder]) -> None:
    """The measured call writes whole sequences at once, which rings do not allow."""
    ids = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(3))
    rows = qcompiler.attribute_error(gemma[1], ids, gemma[0]).rows
    assert len(rows) == 4 and all(row.own == float("inf") for row in rows)


def test_a_cache_that_cannot_fit_names_a_length_that_does() -> None:
    fixed, nbytes, place = 2**20, 2**60, torch.device("cpu")
    with pytest.raises(InputError, match=r"such as max_length=\d+") as error:
        check_fits(nbytes + fixed, place, 1, 2**40, fixed)
    length, fits = map(int, re.findall(r"max_length=(\d+)", str(error.value)))
    assert length == 2**40 and 0 < fits < length
    check_fits(nbytes * fits // length + fixed, place, 1, fits, fixed)
    with pytest.raises(InputError, match=r"need at most [\d.]+ \w+ on cpu\. "):
        check_fits(2**60, place, 1, 2**40, 2**60)


def test_longer_calls_are_refused(gemma: tuple[Any, Decoder]) -> None:
    problem = (
        "a call has more tokens than the caches of layers with windows allow: got 14 tokens per row; need at most 13"
    )
    with pytest.raises(InputError, match=problem):
        gemma[1].step(torch.ones(1, 14, dtype=torch.int64), ZERO, ZERO, ZERO)
    with pytest.raises(InputError, match="max_chunk is wrong: got 0"):
        made(gemma[0], max_chunk=0)


def test_the_passes_of_a_gpu_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused append and its queries, in the torch definitions of their operations."""
    monkeypatch.setattr(device, "_TARGETS", dict(device.known_targets()))
    target = register(Target("fusing", "cpu", "a CPU that fuses", passes=HOPPER.passes)).name
    model = models.MODELS["mistral"](num_hidden_layers=1).bfloat16()
    plain, fused = (made(model, kv_cache="fp8", target=name) for name in ("cpu", target))
    assert fused.graph.ops("state.fused_append") and not plain.graph.ops("state.fused_append")
    answers = [each.generate(PROMPTS[:2], max_new_tokens=8, ignore_eos=True) for each in (plain, fused)]
    assert answers[0] == answers[1]
