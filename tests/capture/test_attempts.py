"""The order of capture attempts: which are made after which errors, and what the user reads."""

import pytest
import torch

from qcompiler.capture.answers import DataDependent
from qcompiler.capture.attempts import with_fewer_sizes
from qcompiler.capture.examples import Call
from qcompiler.capture.exporting import ALL_OPEN, ANSWERED, FLAT_OPEN, Untraceable
from qcompiler.errors import CaptureError

FLAT: Call = ((torch.ones(2, 3),), {})
IMAGE: Call = ((torch.ones(1, 3, 8, 8),), {})
UNTRACEABLE, READS = (
    Untraceable("it cannot be traced", got="RuntimeError: no"),
    DataDependent("it reads", where="m.py:3"),
)
FIXED = "all sizes are fixed to the example's, because "


def attempted(call: Call, *errors: CaptureError) -> tuple[list[str | None], str]:
    """The attempts if the first ones fail with the given errors, and the sentence for the user."""
    made: list[str | None] = []

    def attempt(shapes: str | None) -> None:
        made.append(shapes)
        if len(made) <= len(errors):
            raise errors[len(made) - 1]

    return made, with_fewer_sizes(call, attempt)[1]


@pytest.mark.parametrize(
    ("call", "errors", "attempts", "sentence"),
    [
        (FLAT, [], [ALL_OPEN], ""),
        (FLAT, [UNTRACEABLE], [ALL_OPEN, None], f"{FIXED}torch.export fails with dynamic sizes (RuntimeError: no)"),
        (FLAT, [READS], [ALL_OPEN, ANSWERED], f"{FIXED}the model's code reads tensor values (first at m.py:3)"),
        (FLAT, [UNTRACEABLE, READS], [ALL_OPEN, None, ANSWERED],
         f"{FIXED}the model's code reads tensor values (first at m.py:3)"),
        (IMAGE, [UNTRACEABLE, READS], [ALL_OPEN, FLAT_OPEN, ANSWERED],
         f"{FIXED}the model's code reads tensor values (first at m.py:3)"),
    ],
)  # fmt: skip
def test_answers_are_tried_after_the_first_data_dependent_error(
    call: Call, errors: list[CaptureError], attempts: list[str | None], sentence: str
) -> None:
    assert attempted(call, *errors) == (attempts, sentence)


def test_the_data_dependent_error_is_raised_if_no_attempt_succeeds() -> None:
    with pytest.raises(CaptureError) as error:
        attempted(FLAT, UNTRACEABLE, READS, DataDependent("an answer depends on a parameter"))
    assert error.value is READS
    with pytest.raises(CaptureError) as error:
        attempted(FLAT, UNTRACEABLE, Untraceable("it fails again"))
    assert error.value is UNTRACEABLE
