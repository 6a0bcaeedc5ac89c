"""`compile`: capture, run the pipeline, generate the host module; and the callable that comes of it.

    model -> capture -> Graph -> passes -> Graph -> host module -> CompiledModel
"""

import linecache
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import codegen.torch_ops  # noqa: F401  (registers the kernels as operators of torch)
from codegen.host import HostModule, emit_host_module, load_host_module
from qcompiler import knobs
from qcompiler.capture import Captured, capture
from qcompiler.capture.signature import MISSING, NumberSlot, Signature, TensorSlot
from qcompiler.dialects.aten import torch_dtype
from qcompiler.errors import CaptureError, PassError, QCompilerError
from qcompiler.instruments import Dump, Instrument, PrintAfter, TimePasses
from qcompiler.ir import Graph, ScalarType, TensorType, Value
from qcompiler.pass_manager import Pipeline
from qcompiler.pass_runner import Stages, keep_text, run_pipeline
from qcompiler.report import Report, build_report
from qcompiler.runtime.device import target_for
from qcompiler.schemes import pipeline as scheme_pipeline

_numbers = count()


@dataclass(frozen=True)
class Recipe:
    """How to compile: everything but the model and its inputs."""

    pipeline: Pipeline
    target: str = "auto"
    dynamic_shapes: Any = "auto"
    strict: bool = True
    instruments: tuple[Instrument, ...] = field(default=())


@dataclass(frozen=True)
class Program:
    """What compilation yields: the stages, the report, and the host module with its loaded function."""

    graph: Graph
    stages: Stages
    report: Report
    host: HostModule
    signature: Signature
    run: Callable[..., tuple[Any, ...]]


def compile(
    model: "torch.nn.Module | ExportedProgram | Graph",
    *,
    scheme: str = "fp8_tile",
    pipeline: "Pipeline | str | None" = None,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = "auto",
    target: str = "auto",
    strict: bool = True,
    instruments: Sequence[Instrument] = (),
) -> "CompiledModel":
    """A quantized model that is called as the model is.

    The model is not changed. Its weights are not copied either: those that are quantized are let go one by one, so
    when nobody else holds the model, no more than one of them is in memory beside its quantized form.

    Args:
        model: A module in evaluation mode, an exported program, or a graph with its weights.
        scheme: The name of a recipe; `qcompiler schemes` lists them.
        pipeline: Passes to run in place of the scheme's, as a value or as text.
        example_inputs: Positional arguments of one real call. Without them the model is captured at its first call.
        example_kwargs: Keyword arguments of that call.
        dynamic_shapes: "auto" leaves every size open that the model leaves open, batch and sequence above all; None
            fixes all sizes to those of the example; anything else goes to `torch.export`.
        target: "auto" (by the model's device), "cpu" or "sm_90a".
        strict: Whether it is an error when nothing at all could be quantized.
        instruments: Called around each pass; see `qcompiler.instruments`.

    Raises:
        CaptureError: The model cannot be captured, or the graph does not compute what the model computes.
        PassError: A scheme, pass or option is unknown, or a pass failed.
        CodegenError: The target is unknown or cannot run the graph.
    """
    if isinstance(pipeline, str):
        pipeline = Pipeline.parse(pipeline)
    recipe = Recipe(
        pipeline if pipeline is not None else scheme_pipeline(scheme),
        target,
        dynamic_shapes,
        strict,
        (*instruments, *_instruments_from_environment()),
    )
    if isinstance(model, Graph):
        return CompiledModel._of(_build(graph_as_captured(model), recipe, None), recipe)
    if not isinstance(model, ExportedProgram) and example_inputs is None and example_kwargs is None:
        return CompiledModel(recipe, pending=model)
    args, kwargs = tuple(example_inputs or ()), dict(example_kwargs or {})
    captured = capture(model, args, kwargs, dynamic_shapes=recipe.dynamic_shapes)
    del model  # whoever else holds it may let it go now: the graph has the weights
    return CompiledModel._of(_build(captured, recipe, _flat(captured, args, kwargs)), recipe)


def graph_as_captured(graph: Graph) -> Captured:
    """A copy of `graph` over the same tensors, called with its inputs in order; several outputs come as a tuple."""
    device = next((tensor.device for tensor in graph.weights.values()), torch.device("cpu"))
    slots = [_slot(value, device) for value in graph.inputs]
    in_spec = pytree.tree_structure((tuple(range(len(slots))), {}))
    leaves = tuple(range(len(graph.outputs)))
    out_spec = pytree.tree_structure(leaves[0] if len(leaves) == 1 else leaves)
    parameters = tuple((slot.name, MISSING) for slot in slots)
    return Captured(graph.clone(), Signature(in_spec, out_spec, tuple(slots), graph.symbols, parameters, device))


def _slot(value: Value, device: torch.device) -> "TensorSlot | NumberSlot":
    if isinstance(value.type, TensorType):
        return TensorSlot(value.name, value.name, torch_dtype(value.type.dtype), device, value.type.shape)
    return NumberSlot(value.name, value.name, value.type.value if isinstance(value.type, ScalarType) else None)


def _flat(captured: Captured, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
    """The example as inputs of the graph; None when there is no example (an exported program may come without)."""
    return captured.signature.flatten(args, kwargs) if args or kwargs else None


def _build(captured: Captured, recipe: Recipe, inputs: Sequence[Any] | None) -> Program:
    graph, signature = captured.graph, captured.signature
    del captured
    target = target_for(recipe.target, signature.device or torch.device("cpu"))
    done = run_pipeline(recipe.pipeline, graph, instruments=recipe.instruments, inputs=inputs)
    report = build_report(done.stages["captured"], graph, done.reasons)
    if recipe.strict and not report.quantized:
        raise PassError(
            "nothing was quantized",
            got=f"the pipeline '{recipe.pipeline}'",
            need="at least one matmul with a constant operand that a pass quantizes",
            fix=f"Pass strict=False to accept that. What was left alone, and why:\n{report}",
        )
    host = _emit(graph, target.name)
    filename = f"<qcompiler host module {next(_numbers)}: {graph.name}>"
    linecache.cache[filename] = (len(host.source), None, host.source.splitlines(True), filename)
    return Program(graph, done.stages, report, host, signature, load_host_module(host, filename))


def _emit(graph: Graph, target: str) -> HostModule:
    try:
        return emit_host_module(graph, target)
    except QCompilerError:
        raise
    except Exception as error:
        kept = keep_text(graph, "host")
        raise QCompilerError(
            f"generating the host module failed unexpectedly: {type(error).__name__}: {error}",
            fix=f"The graph that it was given is in {kept}; please report it together with this message.",
        ) from error


def _instruments_from_environment() -> list[Instrument]:
    now = knobs.current()
    wanted: list[Instrument] = []
    if now.print_after:
        wanted.append(PrintAfter(*now.print_after))
    if now.dump_dir:
        wanted.append(Dump(now.dump_dir))
    if now.time_passes:
        wanted.append(TimePasses(file=sys.stderr))
    return wanted


class _Weights(torch.nn.Module):
    """The tensors that a host module reads, as buffers, so that they move and save with the compiled model."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        for attribute, name in program.host.weights.items():
            self.register_buffer(attribute, program.graph.weights[name])
        self.device = program.signature.device or torch.device("cpu")


class CompiledModel(torch.nn.Module):
    """A quantized model; called as the model it came from.

    Attributes:
        graph: The graph after the last pass, with the weights.
        stages: "captured", then the graph after each pass, by the pass's name. Structure only.
        report: One row for each reader of weights: quantized, or why not.
        source: The generated host module.
    """

    def __init__(self, recipe: Recipe, *, pending: torch.nn.Module | None = None) -> None:
        """Use `qcompiler.compile`."""
        super().__init__()
        self._pending = (pending,)  # in a tuple, so as not to become a sub-module
        self._recipe = recipe
        self._program: Program | None = None
        self.eval()

    @classmethod
    def _of(cls, program: Program, recipe: Recipe) -> "CompiledModel":
        compiled = cls(recipe)
        compiled._accept(program)
        return compiled

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model would answer, from the quantized graph; the first call captures it, if that is still to do.

        Raises:
            InputError: The arguments are not of the kind that the model was captured for.
        """
        program = self._program
        if program is None:
            program = self._compile_now(args, kwargs)
        with torch.no_grad():
            outputs = program.run(self.weights, *program.signature.flatten(args, kwargs))
        return program.signature.unflatten(outputs)

    @property
    def graph(self) -> Graph:
        """The graph after the last pass, with the weights."""
        return self._done.graph

    @property
    def stages(self) -> Stages:
        """The graph as captured and after each pass, by name, in order."""
        return self._done.stages

    @property
    def report(self) -> Report:
        """What was quantized, and why the rest was not."""
        return self._done.report

    @property
    def source(self) -> str:
        """The text of the host module."""
        return self._done.host.source

    @property
    def pipeline(self) -> Pipeline:
        """The passes that ran, or will run."""
        return self._recipe.pipeline

    @property
    def _done(self) -> Program:
        if self._program is None:
            raise CaptureError(
                "the model is not captured yet",
                fix="Call it once with real inputs, or give example_inputs to compile().",
            )
        return self._program

    def _accept(self, program: Program) -> None:
        self._program = program
        self.weights = _Weights(program)

    def _compile_now(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        if torch.compiler.is_compiling():
            raise CaptureError("the model is not captured yet", fix="Call it once before torch.compile or torch.export.")
        (model,) = self._pending
        captured = capture(model, args, kwargs, dynamic_shapes=self._recipe.dynamic_shapes)
        program = _build(captured, self._recipe, _flat(captured, args, kwargs))
        self._pending = (None,)
        self._accept(program)
        return program

    def extra_repr(self) -> str:
        """One line."""
        if self._program is None:
            return f"pipeline='{self.pipeline}', not captured yet"
        return f"pipeline='{self.pipeline}', {self.report.summary()}"
