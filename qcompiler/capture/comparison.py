"""Decides whether a graph computes the same as its model, by comparing their results.

Equal bits pass at once, which is the usual case. If bits differ, either a kernel summed in another order, or the graph
is wrong. No constant separates the two at the depth of an LLM in bf16, so an experiment does:

1. Both run in FP64 (`double`). A wrong graph differs by far more than 1e-9; a correct one does not.
2. The graph's rounding error, its distance from FP64, must be similar to the model's: at most `RATIO` times as large.
   If the model's error happens to be small, runs with random rounding errors (`noise`) show how large it may be. An
   entry that jumps, such as an expert choice, jumps in some of these runs too.

Without FP64 (an operator lacks support, or memory is short), the second test alone decides, relative to the model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from qcompiler.capture.distance import Distance
from qcompiler.capture.double import DoublePrecision, value_of, widened
from qcompiler.capture.examples import Call
from qcompiler.capture.noise import RoundingNoise
from qcompiler.capture.quiet import third_party_silence
from qcompiler.capture.runs import ModelRefused, Runs
from qcompiler.errors import CaptureError

DOUBLE_TOLERANCE = 1e-9
"""Largest relative difference in FP64. Its rounding noise is about 1e-15; the margin is for ill-conditioned models."""

RATIO = 4
"""Largest ratio of the graph's rounding error to the model's. Two samples of one rounding noise differ by less:
benchmarks/capture_check.py measures it."""

FLOOR = 4
"""Always allowed: units in the last place of an output's root mean square."""

RUNS = 16
"""Runs with random rounding errors before a graph is rejected: enough to see a choice between two near values flip."""

PROBLEM = "the captured graph does not compute what the model computes: "
FIX = (
    "A Python branch on a size, or state outside of buffers, may have been traced for one case only; "
    "dynamic_shapes=None captures the given sizes alone."
)

Found = Mapping[str, Any]
"""The results of a run: a value for each output, and for each buffer and input that it writes."""


def compare(runs: Runs, call: Call) -> None:
    """Raises CaptureError if graph and model differ on a call, ModelRefused if the model does not run.

    The model runs once if bits are equal, and up to `RUNS` + 2 times otherwise.
    """
    want, got = runs.of_model(call), runs.of_graph(call)
    shapes = ", ".join(f"{name}{list(leaf.shape)}" for name, leaf in runs.named_tensors(call))
    differing = [what for what, value in want.items() if not _equal(what, got.get(what), value, shapes)]
    if not differing:
        return
    want, got = ({what: found[what] for what in differing} for found in (want, got))
    truth: Found = want
    try:
        exact, other = (_in_double(partial(run, call), differing) for run in (runs.of_model, runs.of_graph))
    except Exception:  # an operator without FP64 support may raise anything, and memory may be short
        pass
    else:
        truth = exact
        _check_double(exact, other, shapes)
    _check_rounding(runs, call, want, got, truth, shapes)


def same_values(first: Callable[..., Found], second: Callable[..., Found], names: Sequence[str]) -> bool:
    """Whether two model runs give equal results: bit for bit, or in FP64.

    Args:
        first: Called without arguments, or with the dispatch mode and the `enter` function of a run in FP64.
        second: Likewise.
        names: The results to compare.
    """
    left, right = first(), second()
    try:
        if all(_equal(name, left[name], right[name], "") for name in names):
            return True
        _check_double(_in_double(first, names), _in_double(second, names), "")
    except Exception:  # they differ, or an operator does not support FP64
        return False
    return True


def _equal(what: str, got: Any, want: Any, shapes: str) -> bool:
    """Whether two values are bitwise equal; CaptureError if rounding cannot explain the difference."""
    if not isinstance(want, torch.Tensor) or not isinstance(got, torch.Tensor):
        if got != want and (got == got or want == want):  # NaN is not equal to itself
            raise CaptureError(f"{PROBLEM}{what} differs", got=got, need=want, where=shapes)
        return True
    if got.shape != want.shape or got.dtype != want.dtype:
        kinds = [f"{t.dtype} of shape {tuple(t.shape)}" for t in (got, want)]
        raise CaptureError(f"{PROBLEM}{what} differs", got=kinds[0], need=kinds[1], where=shapes)
    return bool(((got == want) | (got != got) & (want != want)).all())


def _in_double(run: Callable[..., Found], names: Iterable[str]) -> Found:
    """Returns the results of a run in FP64."""
    # MKL-DNN operators do not support FP64, and are selected by dtype.
    with third_party_silence(), torch.backends.mkldnn.flags(enabled=False):
        found = run(DoublePrecision(), widened)
    return {name: value_of(found[name]) for name in names}


def _check_double(want: Found, got: Found, shapes: str) -> None:
    for what, value in want.items():
        distance, limit = Distance.between(got[what], value), Distance.of_size(value, DOUBLE_TOLERANCE)
        if not distance.within(limit):
            raise CaptureError(
                f"{PROBLEM}{what} differs, in FP64 as well",
                got=distance,
                need=f"at most {limit}",
                where=shapes,
                fix=FIX,
            )


def _check_rounding(runs: Runs, call: Call, want: Found, got: Found, truth: Found, shapes: str) -> None:
    """Compares the graph's distance from `truth` with the model's, with and without random rounding errors."""
    distances = {what: Distance.between(got[what], truth[what]) for what in want}
    noise = {what: Distance.of_size(value, _unit(value) * FLOOR / RATIO) for what, value in want.items()}
    for sample in _samples(runs, call, want):
        noise = {what: least.or_larger(Distance.between(sample[what], truth[what])) for what, least in noise.items()}
        beyond = [what for what, most in noise.items() if not distances[what].within(most.times(RATIO))]
        if not beyond:
            return
    what = beyond[0]
    raise CaptureError(
        f"{PROBLEM}{what} differs by more than rounding explains",
        got=distances[what],
        need=f"at most {RATIO} times the model's own rounding error: {noise[what]}",
        where=shapes,
        fix=FIX,
    )


def _samples(runs: Runs, call: Call, want: Found) -> Iterator[Found]:
    """Yields the model's results, first as it rounds, then with random rounding errors."""
    yield want
    for seed in range(RUNS):
        try:
            yield runs.of_model(call, RoundingNoise(seed))
        except ModelRefused:  # an operator requires exact values, such as probabilities that sum to 1
            return


def _unit(value: torch.Tensor) -> float:
    return torch.finfo(value.dtype).eps if value.is_floating_point() or value.is_complex() else 0.0
