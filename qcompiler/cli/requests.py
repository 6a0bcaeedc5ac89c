"""Builds the pipeline for the command line: a scheme, a pipeline, or overrides for some layers."""

from collections.abc import Mapping, Sequence

from passes.quantizing.calibrate import Calibrate
from qcompiler.errors import PassError
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.schemes.named import pipeline as scheme_pipeline
from qcompiler.schemes.named import with_ignored

NOTHING = "none"
"""Scheme name in an override that skips layers."""


def pipeline_of(scheme: str | None, pipeline: str | None, overrides: Mapping[str, str | None] | None) -> Pipeline:
    """The passes of `scheme` or `pipeline`, exactly one of which is given."""
    if scheme is not None:
        return scheme_pipeline(scheme, overrides)
    if overrides is not None:
        fix = "Give a scheme, or put the layers into the pipeline's passes."
        raise PassError(
            "both overrides and a pipeline are given", got=", ".join(overrides), need="one of them", fix=fix
        )
    return Pipeline.parse(pipeline or "")


def overrides_of(given: Sequence[str], ignored: Sequence[str] = ()) -> Mapping[str, str | None] | None:
    """Overrides from `--override PATTERN=SCHEME` and `--ignore PATTERN`; None if neither is given."""
    found: dict[str, str | None] = {}
    for text in given:
        pattern, equals, scheme = (part.strip() for part in text.partition("="))
        if not equals or not pattern or not scheme:
            need = f'PATTERN=SCHEME, such as "*.down_proj=fp8_row" or "lm_head={NOTHING}"'
            raise PassError("an override is malformed", got=repr(text), need=need)
        found.pop(pattern, None)  # the last match wins, also in order
        found[pattern] = None if scheme == NOTHING else scheme
    return with_ignored(found or None, ignored)


def needs_data(pipeline: Pipeline) -> bool:
    """Whether the pipeline needs calibration data."""
    return any(isinstance(step, Calibrate) for step in pipeline)
