"""From a model to a program: captured, rewritten by the pipeline, and generated as a host module."""

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

import codegen.torch_ops  # noqa: F401  (registers the kernels as operators of torch)
from codegen.host import HostModule, emit_host_module, load_host_module
from passes.quantizing.scheme_options import SchemeOptions
from qcompiler.calibration import Calibration
from qcompiler.capture import Captured, capture
from qcompiler.capture.arguments import MISSING
from qcompiler.capture.signature import NumberSlot, Signature, TensorSlot
from qcompiler.errors import CaptureError, CaptureWarning, CodegenError, PassError, QCompilerError
from qcompiler.ir import Graph, ScalarType, TensorType, Value
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
"""torch.export keeps global state, and two first calls of one model must not both capture it."""

_numbers = count()


@dataclass(frozen=True)
class Settings:
    """How to compile: everything but the model and its inputs.

    Attributes:
        pipeline: The passes; their text for a model that was loaded, whose passes need not be installed.
        scheme: What the passes were made from, with its options; None for passes that were given as such.
        overrides: Schemes for some layers.
        progress: Shows what is going on.
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
        """The passes as values; PassError when one of a loaded model's is not installed here."""
        return Pipeline.parse(self.pipeline) if isinstance(self.pipeline, str) else self.pipeline

    def calibration_for(self, signature: Signature) -> Calibration | None:
        """What is known, or can be found out, of the values of a graph with this signature."""
        if isinstance(self.calibration, Batches):
            return Calibration(self.calibration.flattened(signature))
        return self.calibration


@dataclass(frozen=True)
class Program:
    """What compilation yields: the stages, the report, and the host module with its loaded function.

    Attributes:
        graph: The graph after the last pass, with the weights.
        stages: "captured", then the graph after each pass, by the pass's name. Structure only.
        steps: The passes that ran: how long each took, and whether it changed the graph.
        report: One row for each operation that reads weights: quantized, or why not.
        host: The generated host module.
        signature: How a call's arguments become the graph's inputs.
        target: The name of what the host module is written for.
        device: Where its weights are, and where it runs.
        run: The host module's function.
        settings: How it was compiled, without the instruments and the calibration data.
        original: The model that was compiled.
        calibration: Gives what was seen of the captured graph's values; None where no pass needs calibration.
        skipped: Stage -> name of a value -> why that pass did not change the operation that computes it.
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
        """The dtype of the first floating-point result; torch's default if there is none."""
        kinds = (value.type for value in self.graph.outputs if isinstance(value, Value))
        dtypes = (torch_dtype(kind.dtype) for kind in kinds if isinstance(kind, TensorType))
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.get_default_dtype())

    def unfused(self) -> Graph:
        """The last stage in which every layer has its own operation, with the weights."""
        graph = unfused(self.stages.values())[-1].clone()
        graph.weights = self.graph.weights
        return graph

    def with_weights(self, stage: str | None) -> tuple[Graph, MutableMapping[str, torch.Tensor]]:
        """A stage by name, or the last one, and its weights, some of which only the original model may have."""
        if stage is None:
            return self.graph, self.graph.weights
        model = self.original.again()
        before = Weights.from_module(model) if isinstance(model, torch.nn.Module) else Weights()
        return self.stages[stage], ChainMap(self.graph.weights, before)

    def with_own_weights(self, memo: dict[int, Any]) -> "Program":
        """The same with copies of all tensors."""
        graph = self.graph.clone()
        for name, tensor in graph.weights.items():
            graph.weights[name] = copy.deepcopy(tensor, memo)
        return replace(self, graph=graph)


class HasProgram(Protocol):
    """A compiled model, as the report, checkpoints and error analysis see it."""

    @property
    def program(self) -> Program:
        """What was compiled; CaptureError for a model that is still to be captured."""


@contextmanager
def plain_torch() -> Iterator[None]:
    """Neither the caller's autocast nor his inference mode: a graph and its weights outlive both."""
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def capture_model(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], settings: Settings) -> Captured:
    """A module, an exported program or a graph as a captured graph; CaptureError when that cannot be."""
    if isinstance(model, Graph):
        return graph_as_captured(model)
    try:
        shown = next((one for one in settings.instruments if isinstance(one, Progress)), settings.progress)
        with capturing, plain_torch(), shown.telling("qcompiler.capture"):
            settings.progress.stage("capture")
            return capture(model, args, kwargs, dynamic_shapes=settings.dynamic_shapes)
    except (QCompilerError, CaptureWarning):  # a warning only where the user made it an error
        raise
    except Exception as error:
        problem = f"capturing the model failed unexpectedly: {type(error).__name__}: {error}"
        raise CaptureError(problem, fix="Please report it together with this message.") from error


def graph_as_captured(graph: Graph) -> Captured:
    """A copy of `graph` over the same tensors, called with its inputs in order; several outputs come as a tuple."""
    device = next((tensor.device for tensor in graph.weights.values()), CPU)
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


def build_program(captured: Captured, settings: Settings, inputs: Sequence[Any] | None) -> Program:
    """Runs the pipeline over a captured graph, in place, and generates the host module.

    Args:
        captured: What `capture_model` gave.
        settings: How to compile.
        inputs: Real inputs of the graph, for the instruments that run it.
    """
    graph, signature = captured.graph, captured.signature
    device = signature.device or CPU
    target = target_for(settings.target, device)
    check_kernels(settings.passes, target)
    graph.calibration = calibration = settings.calibration_for(signature)
    gc.collect()  # tracing leaves cycles behind, which may hold the model: its weights could not be let go one by one
    with plain_torch():
        done = run_pipeline(
            settings.passes, graph, instruments=(*settings.instruments, settings.progress), inputs=inputs
        )
        for op in graph.ops(BUFFER):  # the model keeps its own state
            name = str(op.attrs["name"])
            graph.weights[name] = graph.weights[name].clone()
    report = replace(build_report(done.stages, graph, done.reasons, done.remarks), notes=captured.notes)
    if settings.strict and not report.quantized:
        raise _nothing_quantized(report, settings, done.stages["captured"])
    host, run = generate(graph, target.name)
    graph.calibration = None
    if calibration is not None and calibration is not settings.calibration:
        calibration.batches = None  # the statistics stay, the user's data need not
    return Program(
        graph, done.stages, done.steps, report, host, signature, target.name, device, run,
        settings=replace(settings, instruments=(), calibration=None),  # which may hold a lot
        calibration=lambda: calibration, skipped=done.skipped,
    )  # fmt: skip


def _nothing_quantized(report: Report, settings: Settings, captured: Graph) -> PassError:
    """The error for a pipeline that quantized nothing, with the scheme that fits a stored model."""
    fits = stored_scheme(captured)
    advice = f'The model is stored quantized: compile it with scheme="{fits}". ' if fits else ""
    return PassError(
        "nothing was quantized",
        got=f"the pipeline '{settings.pipeline}'",
        need="at least one matmul with a constant operand that a pass quantizes",
        fix=f"{advice}Pass strict=False, or --allow-unquantized on the command line, to accept that. "
        f"What was left alone, and why:\n{report}",
    )


def check_kernels(pipeline: Pipeline, target: Target) -> None:
    """CodegenError for a pass that quantizes as no kernel of the target can multiply."""
    for step in pipeline:
        if not isinstance(step, SchemeOptions):
            continue
        if (why := target.why_not(step.x_format, step.w_format)) is not None:
            raise CodegenError(
                f"pass '{step}' quantizes as no kernel of the target {target.name} can multiply", got=why,
                fix='Choose another scheme, or compile the model on the CPU for target="cpu", where it is simulated.',
            )  # fmt: skip


def generate(graph: Graph, target: str) -> tuple[HostModule, Callable[..., tuple[Any, ...]]]:
    """The host module, loaded, with its text where tracebacks and debuggers look for it."""
    filename = f"<qcompiler host module {next(_numbers)}: {graph.name}>"
    try:
        host = emit_host_module(graph, target)
        run = load_host_module(host, filename)
    except QCompilerError:
        raise
    except Exception as error:
        raise QCompilerError(
            f"generating the host module failed unexpectedly: {type(error).__name__}: {error}",
            fix=f"The graph that it was given is in {keep_text(graph, 'host')}; please report both.",
        ) from error
    linecache.cache[filename] = (len(host.source), None, host.source.splitlines(True), filename)
    weakref.finalize(run, linecache.cache.pop, filename, None).atexit = False
    return host, run
