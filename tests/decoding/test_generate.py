"""`generate` and `stream`: prompts of every kind, stops, seeds, and errors."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import decoding_models as models
import pytest
import torch
from decoding_models import RecomputingStep

from qcompiler.decoding.generator import Generator
from qcompiler.errors import InputError


class Letters:
    """A tokenizer for tests: token 2 ends, tokens 4 to 29 are letters, 30 and 31 the two bytes of é, others numbers."""

    chat_template = "{{ messages }}"

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(each) - ord("a") + 4 for each in text]}

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **options: Any) -> dict[str, list[int]]:
        assert options == {"add_generation_prompt": True, "return_dict": True}
        return self("".join(f"{each['role'][0]}{each['content']}" for each in messages))

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        assert options == {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        data = b"".join(self._bytes(token) for token in ids)
        return data.decode(errors="replace")

    def _bytes(self, token: int) -> bytes:
        if token in (0, 1, 2):
            return b""
        if token in (30, 31):
            return "é".encode()[token - 30 : token - 29]
        return bytes([token + ord("a") - 4]) if 4 <= token < 30 else f"<{token}>".encode()


def generator(**changes: Any) -> Generator:
    return Generator(RecomputingStep(models.llama(), slots=2, capacity=40), Letters(), **changes)


def test_an_answer_has_the_kind_of_its_prompt() -> None:
    llm = generator()
    ids = llm.generate([5, 9], max_new_tokens=6)
    assert len(ids) == 6
    assert llm.generate(torch.tensor([5, 9]), max_new_tokens=6) == ids
    assert llm.generate([[5, 9], [7]], max_new_tokens=6)[0] == ids
    assert llm.generate(torch.tensor([[5, 9], [5, 9]]), max_new_tokens=6) == [ids, ids]
    text = Letters().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert llm.generate("bf", max_new_tokens=6) == text
    assert llm.generate(["bf", [5, 9]], max_new_tokens=6) == [text, ids]
    chat = [{"role": "user", "content": "x"}]
    assert llm.generate(chat, max_new_tokens=6) == llm.generate("ux", max_new_tokens=6)
    assert llm.generate([chat, chat], max_new_tokens=6) == [llm.generate("ux", max_new_tokens=6)] * 2


def test_a_stop_token_is_the_last_id_and_not_in_the_text() -> None:
    llm = generator()
    ids, text = llm.generate([5, 9], max_new_tokens=9), llm.generate("bf", max_new_tokens=9)
    at = next(place for place in range(2, 9) if ids.index(ids[place]) == place)
    assert llm.generate([5, 9], max_new_tokens=9, stop_tokens=[ids[at]]) == ids[: at + 1]
    short = llm.generate("bf", max_new_tokens=9, stop_tokens=[ids[at]])
    assert text.startswith(short) and short == Letters().decode(
        ids[:at], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    usual = Generator(llm.step, Letters(), stop_tokens=(ids[at],))
    assert usual.generate([5, 9], max_new_tokens=9) == ids[: at + 1]
    assert usual.generate([5, 9], max_new_tokens=9, ignore_eos=True) == ids


def test_stop_strings_cut_the_text_across_tokens() -> None:
    llm = generator()
    text, ids = llm.generate("bf", max_new_tokens=12), llm.generate([5, 9], max_new_tokens=12)
    for begin in range(1, len(text) - 3):
        stop = text[begin : begin + 3]
        wanted = text[: text.index(stop)]
        assert llm.generate("bf", max_new_tokens=12, stop=stop) == wanted
        assert llm.generate("bf", max_new_tokens=12, stop=["not there", stop]) == wanted
        pieces = list(llm.stream("bf", max_new_tokens=12, stop=[stop, "zzz"]))
        assert "".join(pieces) == wanted and all(pieces)
        cut = llm.generate([5, 9], max_new_tokens=12, stop=stop)
        assert ids[: len(cut)] == cut and len(cut) <= len(ids)


def test_a_stream_has_the_pieces_of_the_answer() -> None:
    llm = generator()
    cases: list[dict[str, Any]] = [{}, {"temperature": 1.5, "seed": 4}, {"temperature": 0.9, "top_p": 0.8, "seed": 1}]
    for options in cases:
        text = llm.generate("hello", max_new_tokens=20, **options)
        pieces = list(llm.stream("hello", max_new_tokens=20, **options))
        assert "".join(pieces) == text and len(pieces) > 5
        ids = llm.generate([5, 9, 3], max_new_tokens=20, **options)
        assert list(llm.stream([5, 9, 3], max_new_tokens=20, **options)) == ids


def test_a_stream_may_be_abandoned() -> None:
    llm = generator()
    stream = llm.stream([5, 9], max_new_tokens=20)
    next(stream)
    with pytest.raises(InputError, match="the decoder is busy"):
        llm.generate([5])
    assert len(stream.answer.ids) == 1
    stream.close()
    assert len(llm.generate([5], max_new_tokens=3)) == 3


def test_seeds_decide_and_neighbors_do_not() -> None:
    llm = generator()
    options: dict[str, Any] = {"max_new_tokens": 10, "temperature": 1.3, "top_k": 40, "min_p": 0.001}
    together = llm.generate([[5, 9]] * 5, seed=7, **options)
    assert len({tuple(each) for each in together}) == 5, "prompts of a list must get different noise"
    assert together == llm.generate([[5, 9]] * 5, seed=7, **options)
    assert together == [llm.generate([5, 9], seed=7 + number, **options) for number in range(5)]
    beside = llm.generate([[40], [5, 9], [3] * 20], seed=[0, 9, 2], **options)
    assert beside[1] == together[2]
    assert llm.generate([5, 9], seed=8, **options) != llm.generate([5, 9], seed=9, **options)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[3], [4]], {"seed": [1]}, "there must be one seed for each prompt: got 1 seeds; need 2"),
        ([], {}, "a prompt is empty: need at least one token (in the prompt)"),
        ("", {}, "a prompt is empty: need at least one token (in the prompt)"),
        ([[3], []], {}, "a prompt is empty: need at least one token (in prompt 1)"),
        ([[3], [4, 64]], {}, "got 64 at position 1; need token ids from 0 to 63 (in prompt 1)"),
        ([3, -1], {}, "got -1 at position 1"),
        ([3, 1.5], {}, "got 1.5 at position 1"),
        ([3] * 40, {}, "a prompt is too long: got 40 tokens; need fewer than max_length=40"),
        ([3] * 30, {"max_new_tokens": 11}, "got 30 + 11 tokens; need at most max_length=40"),
        ([3], {"stop_tokens": 7}, "stop_tokens is of a wrong type: got 7; need a list of token ids"),
        ([3], {"max_new_tokens": 0}, "max_new_tokens is wrong: got 0; need 1 or more"),
        ([3], {"temperature": -1.0}, "temperature is wrong: got -1.0; need a number of 0 or more"),
        ([3], {"temperature": float("nan")}, "temperature is wrong: got nan"),
        ([3], {"temperature": "hot"}, "temperature is wrong: got 'hot'"),
        ([3], {"temperature": 1.0, "top_k": 0}, "top_k is wrong: got 0; need 1 or more"),
        ([3], {"temperature": 1.0, "top_k": 2.5}, "top_k is wrong: got 2.5"),
        ([3], {"temperature": 1.0, "top_p": 0}, "top_p is wrong: got 0; need a number above 0 and at most 1"),
        ([3], {"temperature": 1.0, "min_p": 2}, "min_p is wrong: got 2; need a number from 0 to 1"),
        ([3], {"repetition_penalty": 0}, "repetition_penalty is wrong: got 0; need a positive number"),
        ([3], {"seed": "x"}, "seed"),
        ([3], {"top_p": 0.9}, "have no effect on greedy decoding: got no temperature. Give a temperature"),
        ([3], {"stop": ""}, "a stop string is wrong: got ''"),
        ([3], {"stop_tokens": [64]}, "a stop token is not in the vocabulary: got 64"),
        ([3], {"stop_tokens": [4], "ignore_eos": True}, "both stop_tokens and ignore_eos are given"),
        (3, {}, "the prompt is of a wrong type: got int; need a text, a list of chat messages"),
        ([{"content": "x"}], {}, "a message of a chat is malformed"),
    ],
)
def test_errors(prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        generator().generate(prompts, **options)


def test_errors_without_a_tokenizer() -> None:
    llm = Generator(RecomputingStep(models.llama()))
    with pytest.raises(InputError, match="a text prompt needs a tokenizer, and the decoder has none"):
        llm.generate("x")
    with pytest.raises(InputError, match="a stop string needs a tokenizer"):
        llm.generate([3], stop="x")
    assert len(llm.generate([3])) == 31, "the default limit ends with the cache"
    llm.tokenizer = Letters()
    llm.tokenizer.chat_template = None
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        llm.generate([{"role": "user", "content": "x"}])
    with pytest.raises(InputError, match="only one prompt can be streamed: got a list of 2"):
        llm.stream([[3], [4]])
