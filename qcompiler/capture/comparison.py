"""Whether a graph computes what its model computes: the judgment of what comes out of both.

Equal bits pass at once, which is the usual case. Where bits differ, a kernel may have summed in another order, or the
graph may be wrong. No constant tells these apart at the depth of an LLM in bf16, so they are told apart by experiment:

1. Both run in FP64 (`double`). A wrong graph differs there by far more than 1e-9; a right one does not.
2. The graph's own rounding error, its distance from FP64, must be like the model's: at most `RATIO` times as large.
   Where the model was lucky, runs of it with random rounding errors (`noise`) say how large its error may be. An entry
   that jumps, such as the choice of an expert, jumps in some of those as well.

Without FP64 (an operator has none, memory is short), the second test alone decides, relative to the model's run.
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
"""Largest relative difference in FP64, whose rounding noise is about 1e-15: the rest is for ill-conditioned models."""

RATIO = 4
"""How much larger the graph's rounding error may be than the model's. Two samples of one rounding noise differ by less:
benchmarks/capture_check.py measures it."""

FLOOR = 4
"""Units in the last place, of the root mean square of an output, that are always allowed."""

RUNS = 16
"""Runs with random rounding errors before a graph is refused: enough to see a choice between two near values flip."""

PROBLEM = "the captured graph does not compute what the model computes: "
FIX = (
    "A Python branch on a size, or state outside of buffers, may have been traced for one case only; "
    "dynamic_shapes=None captures the given sizes alone."
)

Found = Mapping[str, Any]
"""What a run gives: a value for each output, and for each buffer and input that it writes."""


def compare(runs: Runs, call: Call) -> None:
    """Raises CaptureError when graph and model differ on a call, ModelRefused when the model does not run.

    The model runs once where bits are equal; up to `RUNS` + 2 times where they are not.
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
    except Exception:  # whatever an operator says that takes no FP64, and memory that is too small for it
        pass
    else:
        truth = exact
        _check_double(exact, other, shapes)
    _check_rounding(runs, call, want, got, truth, shapes)


def same_values(first: Callable[..., Found], second: Callable[..., Found], names: Sequence[str]) -> bool:
    """Whether two runs of models give the same: bit for bit, or in FP64.

    Args:
        first: Called with nothing, or with the mode and the entrance of a run in FP64.
        second: The same.
        names: What to compare of what they give.
    """
    left, right = first(), second()
    try:
        if all(_equal(name, left[name], right[name], "") for name in names):
            return True
        _check_double(_in_double(first, names), _in_double(second, names), "")
    except Exception:  # they differ, or an operator takes no FP64
        return False
    return True


def _equal(what: str, got: Any, want: Any, shapes: str) -> bool:
    """Whether two values are equal, bit for bit; CaptureError when no rounding explains how they differ."""
    if not isinstance(want, torch.Tensor) or not isinstance(got, torch.Tensor):
        if got != want and (got == got or want == want):  # NaN is not equal to itself
            raise CaptureError(f"{PROBLEM}{what} differs", got=got, need=want, where=shapes)
        return True
    if got.shape != want.shape or got.dtype != want.dtype:
        kinds = [f"{t.dtype} of shape {tuple(t.shape)}" for t in (got, want)]
        raise CaptureError(f"{PROBLEM}{what} differs", got=kinds[0], need=kinds[1], where=shapes)
    return bool(((got == want) | (got != got) & (want != want)).all())


def _in_double(run: Callable[..., Found], names: Iterable[str]) -> Found:
    """What a run gives in FP64."""
    # The operators of MKL-DNN take no FP64, and are chosen by dtype.
    with third_party_silence(), torch.backends.mkldnn.flags(enabled=False):
        found = run(DoublePrecision(), widened)
    return {name: value_of(found[name]) for name in names}


def _check_double(want: Found, got: Found, shapes: str) -> None:
    for what, value in want.items():
        distance, limit = Distance.between(got[what], value), Distance.of_size(value, DOUBLE_TOLERANCE)
        if not distance.within(limit):
            raise CaptureError(
                f"{PROBLEM}{what} differs, in FP64 as well",
                got=distance, need=f"at most {limit}", where=shapes, fix=FIX,
            )  # fmt: skip


def _check_rounding(runs: Runs, call: Call, want: Found, got: Found, truth: Found, shapes: str) -> None:
    """Compares the graph's distance from `truth` to the model's, which rounds as it does and at random."""
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
        got=distances[what], need=f"at most {RATIO} times what rounding does to the model: {noise[what]}", where=shapes,
        fix=FIX,
    )  # fmt: skip


def _samples(runs: Runs, call: Call, want: Found) -> Iterator[Found]:
    """What the model gives as it rounds, and then with random rounding errors."""
    yield want
    for seed in range(RUNS):
        try:
            yield runs.of_model(call, RoundingNoise(seed))
        except ModelRefused:  # an operator that wants exact values, such as probabilities that sum to 1
            return


def _unit(value: torch.Tensor) -> float:
    return torch.finfo(value.dtype).eps if value.is_floating_point() or value.is_complex() else 0.0
