"""Builds a program from a model: captures it, runs the pipeline, and generates the host module."""

import copy
import gc
import linecache
import threading
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

import codegen.torch_ops  # noqa: F401  (registers the kernels as torch operators)
from codegen.host import HostModule, emit_host_module, load_host_module
from passes.quantizing.scheme_options import SchemeOptions
from qcompiler.calibration import Calibration
from qcompiler.capture import Captured, capture
from qcompiler.capture.arguments import MISSING
from qcompiler.capture.signature import NumberSlot, Signature, TensorSlot
from qcompiler.errors import CaptureError, CaptureWarning, CodegenError, PassError, QCompilerError
from qcompiler.ir import Graph, Role, ScalarType, TensorType, Value
from qcompiler.ir.graph import BUFFER
from qcompiler.numerics.dtypes import torch_dtype
from qcompiler.pass_manager.instruments import Instrument
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import Stages, Step, keep_text, run_pipeline
from qcompiler.program.batches import Batches
from qcompiler.program.original import Original
from qcompiler.progress import Progress
from qcompiler.report.report import Report, build_report, unfused
from qcompiler.runtime.device import Target, target_for
from qcompiler.runtime.weights import Weights
from qcompiler.schemes.stored import stored_scheme

CPU = torch.device("cpu")

capturing = threading.RLock()
"""Guards torch.export's global state, and prevents two first calls from capturing the same model."""

_numbers = count()


@dataclass(frozen=True)
class Settings:
    """The compile settings, without the model and its inputs.

    Attributes:
        pipeline: The passes; as text for a loaded model, whose passes need not be installed.
        scheme: The scheme and options that the passes were made from; None if the caller gave the passes.
        overrides: Schemes for some layers.
        progress: Shows the current stage.
    """

    pipeline: Pipeline | str
    target: str = "auto"
    dynamic_shapes: Any = "auto"
    strict: bool = True
    instruments: tuple[Instrument, ...] = ()
    calibration: "Batches | Calibration | None" = None
    scheme: str | None = None
    overrides: Mapping[str, str | None] | None = None
    progress: Progress = field(default_factory=partial(Progress, shown=False))

    @property
    def passes(self) -> Pipeline:
        """Returns the passes as values; PassError if a pass of a loaded model is not installed."""
        return Pipeline.parse(self.pipeline) if isinstance(self.pipeline, str) else self.pipeline

    def calibration_for(self, signature: Signature) -> Calibration | None:
        """Returns the statistics, or the data to collect them from, for a graph with this signature."""
        if isinstance(self.calibration, Batches):
            return Calibration(self.calibration.flattened(signature))
        return self.calibration


@dataclass(frozen=True)
class Program:
    """The result of compilation: the stages, the report, and the host module with its loaded function.

    Attributes:
        graph: The graph after the last pass, with the weights.
        stages: "captured", then the graph after each pass, by the pass's name. Structure only.
        steps: The passes that ran, with their run time and whether they changed the graph.
        report: One row for each operation that uses weights: how it is quantized, or why not.
        host: The generated host module.
        signature: How a call's arguments become the graph's inputs.
        target: The name of the target of the host module.
        device: The device of the weights, on which the host module runs.
        run: The host module's function.
        settings: The compile settings, without the instruments and the calibration data.
        original: Facts about the original model.
        calibration: Returns the statistics of the captured graph's values; None if no pass needs calibration.
        skipped: Stage -> name of a value -> why the pass skipped the operation that computes it.
    """

    graph: Graph
    stages: Stages
    steps: tuple[Step, ...]
    report: Report
    host: HostModule
    signature: Signature
    target: str
    device: torch.device
    run: Callable[..., tuple[Any, ...]]
    settings: Settings
    original: Original = field(default_factory=Original)
    calibration: Callable[[], Calibration | None] = lambda: None
    skipped: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point result; torch's default dtype if there is none."""
        kinds = (value.type for value in self.graph.outputs if isinstance(value, Value))
        dtypes = (torch_dtype(kind.dtype) for kind in kinds if isinstance(kind, TensorType))
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.get_default_dtype())

    def unfused(self) -> Graph:
        """The last stage before layers are fused, with the weights."""
        graph = unfused(self.stages.values())[-1].clone()
        graph.weights = self.graph.weights
        return graph

    def with_weights(self, stage: str | None) -> tuple[Graph, MutableMapping[str, torch.Tensor]]:
        """Returns a stage by name, or the last one, and its weights; some may exist only in the original model."""
        if stage is None:
            return self.graph, self.graph.weights
        model = self.original.again()
        before = Weights.from_module(model) if isinstance(model, torch.nn.Module) else Weights()
        return self.stages[stage], ChainMap(self.graph.weights, before)

    def with_own_weights(self, memo: dict[int, Any]) -> "Program":
        """Returns a copy with its own tensors."""
        graph = self.graph.clone()
        for name, tensor in graph.weights.items():
            graph.weights[name] = copy.deepcopy(tensor, memo)
        return replace(self, graph=graph)


class HasProgram(Protocol):
    """The interface of a compiled model that the report, checkpoints and error analysis use."""

    @property
    def program(self) -> Program:
        """The compilation result; CaptureError if the model is not captured yet."""


@contextmanager
def plain_torch() -> Iterator[None]:
    """Disables the caller's autocast and inference mode: the graph and its weights outlive both."""
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def capture_model(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], settings: Settings) -> Captured:
    """Captures a module, an exported program or a graph; CaptureError if that fails."""
    if isinstance(model, Graph):
        _check_weights(model)
        return graph_as_captured(model)
    try:
        shown = next((one for one in settings.instruments if isinstance(one, Progress)), settings.progress)
        with capturing, plain_torch(), shown.telling("qcompiler.capture"):
            settings.progress.stage("capture")
            captured = capture(model, args, kwargs, dynamic_shapes=settings.dynamic_shapes)
    except (QCompilerError, CaptureWarning):  # a warning arrives here only if the user made it an error
        raise
    except Exception as error:
        problem = f"capturing the model failed unexpectedly: {type(error).__name__}: {error}"
        raise CaptureError(problem, fix="Please report it together with this message.") from error
    gc.collect()  # tracing leaves cycles that may hold the model and would keep its weights from being freed
    return captured


def _check_weights(graph: Graph) -> None:
    """Raises CaptureError if a graph lacks a weight, as one that was parsed from text does."""
    reads = (str(op.attrs["name"]) for op in graph.ops() if op.role is Role.STATE)
    if missing := [name for name in reads if name not in graph.weights]:
        got = f"none called '{missing[0]}'" + f", and {len(missing) - 1} others" * (len(missing) > 1)
        fix = "A text has no weights: add the tensors, graph.weights[name] = tensor."
        raise CaptureError("the graph reads weights that it does not have", got=got, where=f"@{graph.name}", fix=fix)


def graph_as_captured(graph: Graph) -> Captured:
    """Wraps a copy of `graph` over the same tensors, called with its inputs in order; several outputs form a tuple."""
    return Captured(graph.clone(), _signature_of(graph))


def _signature_of(graph: Graph) -> Signature:
    """The signature of a function that takes the inputs of a graph in order."""
    device = next((tensor.device for tensor in graph.weights.values()), CPU)
    slots = [_slot(value, device) for value in graph.inputs]
    in_spec = pytree.tree_structure((tuple(range(len(slots))), {}))
    leaves = tuple(range(len(graph.outputs)))
    out_spec = pytree.tree_structure(leaves[0] if len(leaves) == 1 else leaves)
    parameters = tuple((slot.name, MISSING) for slot in slots)
    return Signature(in_spec, out_spec, tuple(slots), graph.symbols, parameters, device)


def _slot(value: Value, device: torch.device) -> "TensorSlot | NumberSlot":
    if isinstance(value.type, TensorType):
        return TensorSlot(value.name, value.name, torch_dtype(value.type.dtype), device, value.type.shape)
    return NumberSlot(value.name, value.name, value.type.value if isinstance(value.type, ScalarType) else None)


def build_program(captured: Captured, settings: Settings, inputs: Sequence[Any] | None) -> Program:
    """Runs the pipeline over a captured graph, in place, and generates the host module.

    Args:
        captured: The result of `capture_model`.
        settings: How to compile.
        inputs: Real graph inputs, for instruments that run the graph.
    """
    graph, signature = captured.graph, captured.signature
    device = signature.device or CPU
    target = target_for(settings.target, device)
    check_kernels(settings.passes, target)
    if settings.scheme is not None:  # passes that the caller gave run as they are
        settings = replace(settings, pipeline=settings.passes.append(target.passes))
    graph.calibration = calibration = settings.calibration_for(signature)
    with plain_torch():
        done = run_pipeline(
            settings.passes, graph, instruments=(*settings.instruments, settings.progress), inputs=inputs
        )
        for op in graph.ops(BUFFER):  # the model keeps its own buffers
            name = str(op.attrs["name"])
            graph.weights[name] = graph.weights[name].clone()
    if tuple(value.name for value in graph.inputs) != signature.input_names:  # a pass changed the interface
        signature = replace(_signature_of(graph), device=device)
    notes = (*captured.notes, *(note for each in settings.instruments for note in each.notes()))
    report = replace(build_report(done.stages, graph, done.reasons, done.remarks), notes=notes)
    if settings.strict and not report.quantized:
        raise _nothing_quantized(report, settings, done.stages["captured"])
    host, run = generate(graph, target.name)
    graph.calibration = None
    if calibration is not None and calibration is not settings.calibration:
        calibration.batches = None  # keep the statistics, free the user's data
    return Program(
        graph, done.stages, done.steps, report, host, signature, target.name, device, run,
        settings=replace(settings, instruments=(), calibration=None),  # these may hold much memory
        calibration=lambda: calibration, skipped=done.skipped,
    )  # fmt: skip


def _nothing_quantized(report: Report, settings: Settings, captured: Graph) -> PassError:
    """Returns the error for a pipeline that quantized nothing; suggests the scheme that fits a quantized checkpoint."""
    fits = stored_scheme(captured)
    advice = f'The model is already quantized: compile it with scheme="{fits}". ' if fits else ""
    return PassError(
        "nothing was quantized",
        got=f"the pipeline '{settings.pipeline}'",
        need="at least one matmul with a constant operand that a pass quantizes",
        fix=f"{advice}Pass strict=False, or --allow-unquantized on the command line, to accept that. "
        f"Skipped layers and the reasons:\n{report}",
    )


def check_kernels(pipeline: Pipeline, target: Target) -> None:
    """Raises CodegenError if a pass quantizes to formats that no kernel of the target supports."""
    for step in pipeline:
        if not isinstance(step, SchemeOptions):
            continue
        if (why := target.why_not(step.x_format, step.w_format)) is not None:
            raise CodegenError(
                f"no kernel of the target {target.name} supports the formats of pass '{step}'",
                got=why,
                fix='Choose another scheme, or compile the model on the CPU with target="cpu", which simulates it.',
            )


def generate(graph: Graph, target: str) -> tuple[HostModule, Callable[..., tuple[Any, ...]]]:
    """Generates and loads the host module, and registers its source for tracebacks and debuggers."""
    filename = f"<qcompiler host module {next(_numbers)}: {graph.name}>"
    try:
        host = emit_host_module(graph, target)
        run = load_host_module(host, filename)
    except QCompilerError:
        raise
    except Exception as error:
        raise QCompilerError(
            f"generating the host module failed unexpectedly: {type(error).__name__}: {error}",
            fix=f"Its input graph is in {keep_text(graph, 'host')}; please report both.",
        ) from error
    linecache.cache[filename] = (len(host.source), None, host.source.splitlines(True), filename)
    weakref.finalize(run, linecache.cache.pop, filename, None).atexit = False
    return host, run
