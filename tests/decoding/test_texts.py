"""Incremental text: equal to the decoded text of all tokens, whatever the borders of tokens cut."""

from typing import Any

import decoding_models as models
import pytest

from qcompiler.decoding.texts import TextStream

TEXT = "Héllo wörld — 日本語 \N{FAMILY}\N{PARTY POPPER}\n\n  def f(x):\n    return x\n" * 3


@pytest.fixture(scope="module")
def byte_tokenizer() -> Any:
    return models.byte_tokenizer()


def streamed(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> str:
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    return "".join(pieces) + stream.finish()


def test_pieces_are_whole_characters_and_together_the_text(byte_tokenizer: Any) -> None:
    ids = byte_tokenizer(TEXT)["input_ids"]
    assert len(ids) == len(TEXT.encode())
    stream = TextStream(byte_tokenizer)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) == TEXT and stream.finish() == ""
    assert {len(piece) for piece in pieces} == {0, 1}
    assert streamed(byte_tokenizer, [*ids[:9], 0, *ids[9:], 0]) == TEXT


def test_bytes_that_are_no_text_are_shown_at_the_end(byte_tokenizer: Any) -> None:
    ids = byte_tokenizer("日本")["input_ids"]
    assert streamed(byte_tokenizer, ids[:4]) == "日\N{REPLACEMENT CHARACTER}"
    shuffled = ids[::-1] * 9
    assert streamed(byte_tokenizer, shuffled) == byte_tokenizer.decode(shuffled)


@pytest.mark.parametrize("stop", [("語",), ("return",), ("\n\n",), ("x x", "\n\n  d", "f(x"), ("world", "wö"), ("H",)])
def test_stop_strings(byte_tokenizer: Any, stop: tuple[str, ...]) -> None:
    ids = byte_tokenizer(TEXT)["input_ids"]
    wanted = TEXT[: min(place for each in stop if (place := TEXT.find(each)) >= 0)]
    assert streamed(byte_tokenizer, ids, stop) == wanted


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_decided(byte_tokenizer: Any) -> None:
    stream = TextStream(byte_tokenizer, ("ENDE", "DX"))
    assert [stream.add(token) for token in byte_tokenizer("xENDx")["input_ids"]] == ["x", "", "", "", "ENDx"]
    assert not stream.stopped
    stream = TextStream(byte_tokenizer, ("ENDE", "DX"))
    assert [stream.add(token) for token in byte_tokenizer("xEND")["input_ids"]] == ["x", "", "", ""]
    assert stream.finish() == "END"
    stream = TextStream(byte_tokenizer, ("ENDE", "DX"))
    assert [stream.add(token) for token in byte_tokenizer("xENDX")["input_ids"]] == ["x", "", "", "", "EN"]
    assert stream.stopped and stream.finish() == ""
