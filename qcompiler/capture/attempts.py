"""Capture attempts with fewer and fewer dynamic sizes, when torch.export fails or takes too long."""

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
    """The dynamic sizes of one attempt.

    Attributes:
        shapes: "auto" or another keyword of `exporting`; None for no dynamic sizes.
        words: The fixed sizes, for the user; empty if there are none.
    """

    shapes: str | None
    words: str


class TooSlow(CaptureError):
    """An attempt exceeded QCOMPILER_CAPTURE_SECONDS."""


def with_fewer_sizes(call: Call, attempt: Callable[[str | None], T], sizes: str | None = ALL_OPEN) -> tuple[T, str]:
    """Calls `attempt` with fewer and fewer dynamic sizes; returns the first result, and what was fixed.

    Args:
        call: The user's example.
        attempt: Captures with the dynamic sizes that a keyword selects.
        sizes: The dynamic sizes of the first attempt: ALL_OPEN, or None for no size.

    Returns:
        The result, and a sentence for the user; the sentence is empty if all sizes stayed dynamic.

    Raises:
        CaptureError: If no attempt succeeds, the first data-dependent error, or else the first error; raised at once if
            graph and model differ.
    """
    cause: CaptureError | None = None
    for openness in _ladder(call, sizes):
        if (openness.shapes == ANSWERED) != isinstance(cause, DataDependent):
            continue  # fixed answers help only with data-dependent questions, and only they help with those
        seconds = None if openness.shapes is None else knobs.current().capture_seconds
        limit = "no time limit" if seconds is None else f"at most {seconds:g} s of CPU time"
        logger.info("tracing: %s; %s", openness.words or "all sizes are dynamic", limit)
        try:
            with time_limit(seconds):
                result = attempt(openness.shapes)
        except OutOfTime:
            knob = f"{knobs.PREFIX}CAPTURE_SECONDS"
            error: CaptureError = TooSlow(
                f"torch.export took more than {seconds:g} s of CPU time, the limit set by {knob}"
            )
        except (DataDependent, Untraceable) as failure:
            error = failure
        else:
            return result, f"{openness.words}, because {_reason(cause)}" if cause is not None else ""
        logger.info("%s", error)
        if cause is None or (isinstance(error, DataDependent) and not isinstance(cause, DataDependent)):
            cause = error
    raise cause or CaptureError("there is nothing to capture")


def _ladder(call: Call, sizes: str | None) -> Iterator[Openness]:
    fixed = "all sizes are fixed to the example's"
    if sizes is not None:
        yield Openness(ALL_OPEN, "")
        if any(isinstance(x, torch.Tensor) and spatial_axes(x) for x in (*call[0], *call[1].values())):
            yield Openness(FLAT_OPEN, "heights and widths are fixed to the example's")
    yield Openness(None, "" if sizes is None else fixed)
    yield Openness(ANSWERED, fixed)


def _reason(error: CaptureError) -> str:
    if isinstance(error, TooSlow):
        return str(error)
    if isinstance(error, DataDependent):
        return f"the model's code reads tensor values (first at {error.where})"
    return f"torch.export fails with dynamic sizes ({str(error.got).removesuffix('.')})"
