"""Properties of a compiled model that show parts of its program."""

from collections.abc import Mapping
from typing import Any

import torch

from qcompiler.calibration import Calibration
from qcompiler.capture.signature import Signature
from qcompiler.compiler.pending import PendingModel
from qcompiler.errors import CaptureError
from qcompiler.ir import Graph
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import Stages, Step
from qcompiler.program.program import Program, Settings
from qcompiler.report.report import Report


class ProgramViews:
    """Read-only views of a compiled model; CaptureError for views that need a captured model."""

    _state: PendingModel | Program

    @property
    def program(self) -> Program:
        """The compilation result, which contains all of the properties below."""
        if isinstance(self._state, PendingModel):
            raise CaptureError(
                "the model is not captured yet",
                fix="Call it once with real inputs, or give example_inputs to compile().",
            )
        return self._state

    @property
    def graph(self) -> Graph:
        """The graph after the last pass, with the weights."""
        return self.program.graph

    @property
    def stages(self) -> Stages:
        """The graph after capture and after each pass, by name, in order."""
        return self.program.stages

    @property
    def steps(self) -> tuple[Step, ...]:
        """The passes that ran: spec, effect, whether the pass changed the graph, and its run time."""
        return self.program.steps

    @property
    def report(self) -> Report:
        """Which layers were quantized, and why the others were not."""
        return self.program.report

    @property
    def skipped(self) -> Mapping[str, Mapping[str, str]]:
        """Stage -> name of a value -> why the pass skipped the operation that computes it."""
        return self.program.skipped

    @property
    def source(self) -> str:
        """The text of the host module."""
        return self.program.host.source

    @property
    def calibration(self) -> Calibration | None:
        """Statistics of the captured graph's values on real calls, to inspect, save, or pass to `compile` again."""
        return self.program.calibration()

    @property
    def device(self) -> torch.device:
        """The device that the model was compiled for and runs on."""
        return self.program.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of the model, taken from its first floating-point result."""
        return self.program.dtype

    @property
    def signature(self) -> Signature:
        """The calling convention: how arguments map to graph inputs, and the ranges of sizes."""
        return self.program.signature

    @property
    def settings(self) -> Settings:
        """The compile settings."""
        return self._state.settings

    @property
    def pipeline(self) -> Pipeline:
        """The passes that ran, or will run; PassError if a pass of a loaded model is not installed."""
        return self.settings.passes

    @property
    def origin(self) -> Any:
        """The original model, read again if it came from a folder; None if it has been freed."""
        pending = self._state.model if isinstance(self._state, PendingModel) else None
        return self._state.original.again() if pending is None else pending

    @property
    def config(self) -> Any:
        """The original model's configuration, as in transformers models; AttributeError if there is none."""
        if (config := self._state.original.config()) is None:
            raise AttributeError("the original model has no config")
        return config
