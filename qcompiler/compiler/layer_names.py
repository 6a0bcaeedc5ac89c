"""Checks the patterns of a pipeline against a model's own names, before the model is captured."""

from collections.abc import Iterator

from torch import Tensor, nn

from passes.analyses.layers import EVERYTHING, check_names
from passes.fusing.merge_linears import MergeLinears
from passes.quantizing.calibrate import Calibrate
from passes.quantizing.scheme_options import SchemeOptions
from qcompiler.pass_manager.pipeline import Pipeline


def check_layer_names(pipeline: Pipeline, model: nn.Module) -> None:
    """PassError for a pattern of a pass's `layers` that matches none of the model's tensors or modules.

    That a matmul reads the weight is known only after the capture, where the pass itself checks it.
    """
    steps = (step for step in pipeline if isinstance(step, SchemeOptions | MergeLinears | Calibrate))
    if patterns := {pattern for step in steps for pattern in step.layers if step.layers != EVERYTHING}:
        check_names([*patterns], [*_tensors(model)])


def _tensors(model: nn.Module) -> Iterator[str]:
    """The names that weights have in a graph: parameters, buffers, and tensors that are plain attributes."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = {**module._parameters, **module._buffers, **vars(module)}
        for name, value in own.items():
            if isinstance(value, Tensor):
                yield f"{prefix}.{name}" if prefix else name
