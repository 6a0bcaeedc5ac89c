"""Almost valid texts and files: a valid seed with a few edits, as a hypothesis strategy.

    given(mutated([b"canonicalize; fp8-tile"], words=[b"profile"]))

An edit is seven bytes: its kind and three numbers. Hypothesis draws all edits of an input at once, which is fast, and
shrinks a finding to the fewest edits of the shortest seed. All seeds are bytes: a text is its UTF-8, and its target
decodes it.
"""

import re
import struct
from collections.abc import Callable, Sequence

from hypothesis import strategies as st

TOKEN = re.compile(rb"[\w.]+|\s+|[^\w\s]")
NUMBER = re.compile(rb"\d+")
EDIT = struct.Struct(">BHHH")
BYTES = EDIT.size

# Numbers, names and strings that are hard for parsers.
NUMBERS = (
    b"0", b"-1", b"1e999", b"-1e-999", b"nan", b"inf", b"2147483648", b"9223372036854775808", b"-0", b"1_0", b"0x10",
    b"9" * 40, b"1" * 5000, b"1e5000", b"00", b"1.5", "²".encode(), "٣".encode(),
)  # fmt: skip
STRANGE = (
    b"", b"\0", b"\xff", b"\xc3", b"\n", b"\r", b"\t", b"//", b'"', b"'", b"\\", b"%", b"#", b"@", b"{", b"}", b"[",
    b"]", b"(", b")", b",", b";", b":", b"=", b"->", b"..", b"*", b"//1", b"None", b"true", b"return", b"__class__",
    "é".encode(), "\u2028".encode(), "\U0001d7d9".encode(), "\ufb00".encode(),
    b'"\\ud800"', b"\xed\xa0\x80", b"null", b"{}", b"[]",
)  # fmt: skip
BRACKETS = ((b"(", b")"), (b"[", b"]"), (b"{", b"}"), (b"-", b""), (b'{"a":', b"}"), (b"max(", b")"))
DEPTHS = (3, 40, 300, 3000)

Numbers = tuple[int, int, int]
"""Where an edit is, how far it goes, and what it inserts; each is reduced to the range that the text has."""
Edit = Callable[[bytes, Numbers, Sequence[bytes], Sequence[bytes]], bytes]


def _cut(text: bytes, where: int, length: int) -> tuple[int, int]:
    start = where % (len(text) + 1)
    return start, min(len(text), start + 1 + length % 16)


def _delete(text: bytes, at: Numbers, seeds: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    start, end = _cut(text, at[0], at[1])
    return text[:start] + text[end:]


def _truncate(text: bytes, at: Numbers, seeds: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    return text[: at[0] % (len(text) + 1)]


def _duplicate(text: bytes, at: Numbers, seeds: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    start, end = _cut(text, at[0], at[1] * 5)
    return text[:end] + text[start:end] * (1 + at[2] % 8) + text[end:]


def _flip(text: bytes, at: Numbers, seeds: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    if not text:
        return text
    start = at[0] % len(text)
    return text[:start] + bytes([text[start] ^ (1 << at[1] % 8)]) + text[start + 1 :]


def _insert(text: bytes, at: Numbers, seeds: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    start = at[0] % (len(text) + 1)
    return text[:start] + _word(at, words) + text[start:]


def _replace(text: bytes, at: Numbers, seeds: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    return _in_place_of_one(TOKEN, text, at[0], _word(at, words))


def _renumber(text: bytes, at: Numbers, seeds: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    return _in_place_of_one(NUMBER, text, at[0], NUMBERS[at[2] % len(NUMBERS)])


def _swap(text: bytes, at: Numbers, seeds: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    pieces = TOKEN.findall(text)
    if pieces:
        one, other = at[0] % len(pieces), at[1] % len(pieces)
        pieces[one], pieces[other] = pieces[other], pieces[one]
    return b"".join(pieces)


def _splice(text: bytes, at: Numbers, seeds: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    other = seeds[at[2] % len(seeds)]
    return text[: at[0] % (len(text) + 1)] + other[at[1] % (len(other) + 1) :]


def _nest(text: bytes, at: Numbers, seeds: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    opening, closing = BRACKETS[at[1] % len(BRACKETS)]
    depth = DEPTHS[at[2] % len(DEPTHS)]
    spans = [match.span() for match in TOKEN.finditer(text)] or [(0, 0)]
    start, end = spans[at[0] % len(spans)]
    return text[:start] + opening * depth + text[start:end] + closing * depth + text[end:]


def _word(at: Numbers, words: Sequence[bytes]) -> bytes:
    known = (*STRANGE, *words)
    return known[at[2] % len(known)]


def _in_place_of_one(pattern: re.Pattern[bytes], text: bytes, which: int, new: bytes) -> bytes:
    found = [*pattern.finditer(text)]
    if not found:
        return text + new
    one = found[which % len(found)]
    return text[: one.start()] + new + text[one.end() :]


EDITS: tuple[Edit, ...] = (
    _delete, _truncate, _duplicate, _flip, _insert, _replace, _replace, _renumber, _swap, _splice, _nest,
)  # fmt: skip


def mutated(seeds: Sequence[bytes], words: Sequence[bytes] = ()) -> st.SearchStrategy[bytes]:
    """A seed with one to six edits.

    Args:
        seeds: Valid inputs, shortest first.
        words: Words of the language, inserted in place of others.
    """

    def apply(drawn: bytes) -> bytes:
        text = seeds[int.from_bytes(drawn[:2]) % len(seeds)]
        for at in range(2, len(drawn) - BYTES + 1, BYTES):
            kind, where, length, takes = EDIT.unpack_from(drawn, at)
            text = EDITS[kind % len(EDITS)](text, (where, length, takes), seeds, words)
        return text

    return st.binary(min_size=2 + BYTES, max_size=1 + 7 * BYTES).map(apply)
