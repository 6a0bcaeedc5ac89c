"""How many sizes an attempt leaves open: all at first, and fewer when torch.export fails or takes too long."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from qcompiler import knobs
from qcompiler.capture.answers import DataDependent
from qcompiler.capture.deadline import OutOfTime, time_limit
from qcompiler.capture.examples import Call
from qcompiler.capture.exporting import ALL_OPEN, ANSWERED, FLAT_OPEN, Untraceable, spatial_axes
from qcompiler.errors import CaptureError

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Openness:
    """What an attempt leaves open.

    Attributes:
        shapes: "auto" or another word of `exporting`; None for no size at all.
        words: What is fixed, for the user; empty when nothing is.
    """

    shapes: str | None
    words: str


class TooSlow(CaptureError):
    """An attempt took longer than QCOMPILER_CAPTURE_SECONDS."""


def with_fewer_sizes(call: Call, attempt: Callable[[str | None], T], sizes: str | None = ALL_OPEN) -> tuple[T, str]:
    """The first result of `attempt`, which is called with fewer and fewer open sizes; and what was fixed for that.

    Args:
        call: The user's example.
        attempt: Captures with the sizes open that a word says.
        sizes: What the first attempt leaves open: ALL_OPEN, or None for no size.

    Returns:
        The result, and a sentence for the user, which is empty when all sizes were left open.

    Raises:
        CaptureError: What the first attempt raised, when none works; or a difference between graph and model at once.
    """
    first: CaptureError | None = None
    for openness in _ladder(call, sizes):
        if (openness.shapes == ANSWERED) != isinstance(first, DataDependent):
            continue  # answers help with nothing else, and nothing else helps with questions
        seconds = None if openness.shapes is None else knobs.current().capture_seconds
        limit = "no limit of time" if seconds is None else f"{seconds:g} s of CPU time at most"
        logger.info("tracing: %s; %s", openness.words or "all sizes are open", limit)
        try:
            with time_limit(seconds):
                result = attempt(openness.shapes)
        except OutOfTime:
            knob = f"{knobs.PREFIX}CAPTURE_SECONDS"
            error: CaptureError = TooSlow(
                f"torch.export took more than {seconds:g} s of CPU time, the limit that {knob} sets"
            )
        except (DataDependent, Untraceable) as failure:
            error = failure
        else:
            return result, f"{openness.words}, because {_reason(first)}" if first is not None else ""
        logger.info("%s", error)
        first = first or error
    raise first or CaptureError("there is nothing to capture")


def _ladder(call: Call, sizes: str | None) -> Iterator[Openness]:
    fixed = "all sizes are fixed to those of the example"
    if sizes is not None:
        yield Openness(ALL_OPEN, "")
        if any(isinstance(x, torch.Tensor) and spatial_axes(x) for x in (*call[0], *call[1].values())):
            yield Openness(FLAT_OPEN, "heights and widths are fixed to those of the example")
    yield Openness(None, "" if sizes is None else fixed)
    yield Openness(ANSWERED, fixed)


def _reason(error: CaptureError) -> str:
    if isinstance(error, TooSlow):
        return str(error)
    if isinstance(error, DataDependent):
        return f"the model's code asks for values of tensors (first at {error.where})"
    return f"torch.export fails with open sizes ({str(error.got).removesuffix('.')})"
