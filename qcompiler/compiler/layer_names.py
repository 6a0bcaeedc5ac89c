"""Checks the layer patterns of a pipeline against the model's names, before capture."""

from collections.abc import Iterator

from torch import Tensor, nn

from passes.analyses.layers import EVERYTHING, check_names
from passes.fusing.merge_linears import MergeLinears
from passes.quantizing.calibrate import Calibrate
from passes.quantizing.scheme_options import SchemeOptions
from qcompiler.pass_manager.pipeline import Pipeline


def check_layer_names(pipeline: Pipeline, model: nn.Module) -> None:
    """Raises PassError if a pattern in a pass's `layers` does not match any tensor or module of the model.

    Whether a matmul uses the weight is known only after capture, where the pass checks it.
    """
    steps = (step for step in pipeline if isinstance(step, SchemeOptions | MergeLinears | Calibrate))
    if patterns := {pattern for step in steps for pattern in step.layers if step.layers != EVERYTHING}:
        check_names([*patterns], [*_tensors(model)])


def _tensors(model: nn.Module) -> Iterator[str]:
    """The names that weights have in a graph: parameters, buffers, and tensors in plain attributes."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = {**module._parameters, **module._buffers, **vars(module)}
        for name, value in own.items():
            if isinstance(value, Tensor):
                yield f"{prefix}.{name}" if prefix else name
