"""Errors: one family, one message format, and a suggestion for misspelled names."""

import pickle

import pytest

from qcompiler.errors import (
    CaptureError,
    CodegenError,
    InputError,
    ParseError,
    PassError,
    QCompilerError,
    VerifyError,
    did_you_mean,
)


@pytest.mark.parametrize(
    "kind", [ParseError, VerifyError, CaptureError, PassError, CodegenError, InputError], ids=lambda kind: kind.__name__
)
def test_every_error_belongs_to_the_family(kind: type[QCompilerError]) -> None:
    with pytest.raises(QCompilerError, match=r"^it is wrong$") as caught:
        raise kind("it is wrong")
    assert caught.value.problem == "it is wrong"
    assert kind.__doc__


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (QCompilerError("it is wrong"), "it is wrong"),
        (QCompilerError("it is wrong", got=3), "it is wrong: got 3"),
        (QCompilerError("it is wrong", need="4 or 5"), "it is wrong: need 4 or 5"),
        (QCompilerError("it is wrong", got=0, need=1), "it is wrong: got 0; need 1"),
        (QCompilerError("it is wrong", where="m.py:3"), "it is wrong (in m.py:3)"),
        (QCompilerError("it is wrong", fix="Make it right."), "it is wrong. Make it right."),
        (
            QCompilerError("it is wrong", got="a", need="b", where="pass 'p'", fix="Make it right."),
            "it is wrong: got a; need b (in pass 'p'). Make it right.",
        ),
    ],
)
def test_the_message_has_only_known_fields(error: QCompilerError, text: str) -> None:
    assert str(error) == text


def test_the_fields_can_be_read_from_the_error() -> None:
    error = PassError("it is wrong", got=[1], need=(2,), where="here", fix="Do it.")
    assert (error.problem, error.got, error.need, error.where, error.fix) == (
        "it is wrong",
        [1],
        (2,),
        "here",
        "Do it.",
    )


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(ParseError("it is wrong", got=3, fix="Do it.")))
    assert type(error) is ParseError
    assert str(error) == "it is wrong: got 3. Do it."


@pytest.mark.parametrize(
    ("name", "known", "text"),
    [
        ("smoothqant", ["smoothquant", "fp8_tile"], "Did you mean 'smoothquant'? Known: fp8_tile, smoothquant."),
        ("zzz", ["b", "a"], "Known: a, b."),
        ("zzz", [], "Known: none."),
        ("ab", iter(["ab1", "x"]), "Did you mean 'ab1'? Known: ab1, x."),
    ],
)
def test_did_you_mean(name: str, known: list[str], text: str) -> None:
    assert did_you_mean(name, known) == text
