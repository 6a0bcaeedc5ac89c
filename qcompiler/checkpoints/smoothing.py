"""The smoothing part of a scheme without quantization, for models written in high precision."""

from dataclasses import replace

from passes.cleanup.fold_constants import FoldConstants
from passes.smoothing.smoothquant import SmoothQuant
from qcompiler.errors import PassError
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.schemes.named import pipeline


def smoothing(scheme: str = "smoothquant_o3") -> Pipeline:
    """The passes of a scheme up to smoothing, then the passes that store the smoothed weights.

        compiled = qcompiler.compile(model, pipeline=smoothing("smoothquant_o1"), calibration=batches, strict=False)

    Only factors that fold into weights are applied: a high-precision model has no place for other factors.

    Raises:
        PassError: The scheme does not smooth.
    """
    whole = pipeline(scheme)
    last = max((at for at, step in enumerate(whole) if isinstance(step, SmoothQuant)), default=None)
    if last is None:
        raise PassError("the scheme does not smooth", got=repr(scheme), need="one such as 'smoothquant_o3'")
    steps = [_folding(step) if isinstance(step, SmoothQuant) else step for step in whole.passes[: last + 1]]
    return Pipeline((*steps, FoldConstants(), *(step for step in whole.passes[:last] if step.name == "dead-code")))


def _folding(step: SmoothQuant) -> SmoothQuant:
    """The same pass without factors that need a multiplication in each call."""
    return replace(step, prescale=False)
