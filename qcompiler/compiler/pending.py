"""A model to be captured at its first call."""

import copy
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qcompiler.capture.signature import Signature
from qcompiler.errors import CaptureError
from qcompiler.ir import Graph
from qcompiler.program.batches import Call
from qcompiler.program.original import Original
from qcompiler.program.program import Program, Settings, build_program, capture_model
from qcompiler.runtime.weights import Weights


def observing_once(settings: Sequence[Settings], signature: Signature) -> Iterator[Settings]:
    """Yields the settings; all use the statistics that the first one collects."""
    if len(settings) == 1:
        yield from settings
        return
    shared = settings[0].calibration_for(signature)
    try:
        yield from (replace(each, calibration=shared) for each in settings)
    finally:
        if shared is not None and shared is not settings[0].calibration:
            shared.batches = None  # free the user's data


@dataclass
class PendingModel:
    """A model and its compile settings.

    Attributes:
        model: Released on capture. While the passes run, only the caller may hold it, so that its weights can be freed
            one by one.
        settings: How to compile.
        original: What the compiled model keeps of it.
    """

    model: Any
    settings: Settings
    original: Original

    def compile(self, call: Call | None) -> Program:
        """Captures the model and runs the pipeline; see `compile_each`."""
        (program,) = self.compile_each(call, [self.settings])
        return program

    def compile_each(self, call: Call | None, settings: Sequence[Settings]) -> list[Program]:
        """Captures the model once, and runs the pipelines of several settings.

        Args:
            call: The arguments of one real call; None for a graph or an exported program, which do not need one.
            settings: What differs may be the pipeline only.

        Raises:
            CaptureError: The model cannot be captured, or was freed after an earlier attempt failed.
            QCompilerError: The pipeline or code generation failed.
        """
        return list(self._each(call, settings, apart=False))

    def in_turn(self, call: Call | None, settings: Sequence[Settings]) -> Iterator[Program]:
        """Yields the programs of `compile_each`; each reads its own weights, and nothing holds it afterwards."""
        return self._each(call, settings, apart=True)

    def _each(self, call: Call | None, settings: Sequence[Settings], apart: bool) -> Iterator[Program]:
        if self.model is None:
            raise CaptureError(
                "an earlier compilation failed, and the model has been freed",
                fix="Call compile() again with the model.",
            )
        args, kwargs = call or ((), {})
        captured = capture_model(self.model, args, kwargs, self.settings)
        back, self.model = weakref.ref(self.model), None
        try:
            inputs = captured.signature.flatten(args, kwargs) if call else None
            graphs = [captured.graph, *(captured.graph.clone() for _ in settings[1:])]
            for graph in graphs if apart else ():
                if isinstance(graph.weights, Weights):
                    graph.weights.load_apart()
            captured = replace(captured, graph=Graph(captured.graph.name))  # the loop alone holds the graphs
            for each in observing_once(settings, captured.signature):
                program = build_program(replace(captured, graph=graphs.pop(0)), each, inputs)
                yield replace(program, original=self.original)
                del program
        except BaseException:
            self.model = back()
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> "PendingModel":
        """Returns a copy, with a copy of the model."""
        twin = replace(self, model=copy.deepcopy(self.model, memo))
        if isinstance(self.original.again, weakref.ref) and twin.model is not None:
            twin.original = replace(self.original, again=weakref.ref(twin.model))
        return twin
