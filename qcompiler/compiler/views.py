"""What a compiled model shows: the parts of its program, as properties."""

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
    """Looking at a compiled model; CaptureError for what is not known until the model is captured."""

    _state: PendingModel | Program

    @property
    def program(self) -> Program:
        """What was compiled: all of the following in one value."""
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
        """The graph as captured and after each pass, by name, in order."""
        return self.program.stages

    @property
    def steps(self) -> tuple[Step, ...]:
        """The passes that ran: spec, effect, whether it changed the graph, and how long it took."""
        return self.program.steps

    @property
    def report(self) -> Report:
        """What was quantized, and why the rest was not."""
        return self.program.report

    @property
    def skipped(self) -> Mapping[str, Mapping[str, str]]:
        """Stage -> name of a value -> why that pass left what computes it alone."""
        return self.program.skipped

    @property
    def source(self) -> str:
        """The text of the host module."""
        return self.program.host.source

    @property
    def calibration(self) -> Calibration | None:
        """What was seen of the captured graph's values on real calls, to look at, save, and give to `compile` again."""
        return self.program.calibration()

    @property
    def device(self) -> torch.device:
        """The device that it was compiled for and runs on."""
        return self.program.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type that the model computes in: that of its first floating-point result."""
        return self.program.dtype

    @property
    def signature(self) -> Signature:
        """How it is called: its arguments as the graph takes them, and the sizes that they may have."""
        return self.program.signature

    @property
    def settings(self) -> Settings:
        """How it was compiled, or will be."""
        return self._state.settings

    @property
    def pipeline(self) -> Pipeline:
        """The passes that ran, or will run; PassError when one of a loaded model's is not installed here."""
        return self.settings.passes

    @property
    def origin(self) -> Any:
        """The model that was compiled, read again where it came from a folder; None when nobody holds it any more."""
        pending = self._state.model if isinstance(self._state, PendingModel) else None
        return self._state.original.again() if pending is None else pending

    @property
    def config(self) -> Any:
        """The original model's configuration, as transformers' models have one; AttributeError without one."""
        if (config := self._state.original.config()) is None:
            raise AttributeError("the model that was compiled has no config")
        return config
