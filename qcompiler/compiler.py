"""`compile`: capture, run the pipeline, generate the host module; and the callable that comes of it.

    model -> capture -> Graph -> passes -> Graph -> host module -> CompiledModel
"""

import copy
import inspect
import linecache
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NoReturn

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import codegen.torch_ops  # noqa: F401  (registers the kernels as operators of torch)
from codegen.host import HostModule, emit_host_module, load_host_module
from qcompiler import knobs
from qcompiler.capture import Captured, capture
from qcompiler.capture.preflight import check_model
from qcompiler.capture.signature import MISSING, NumberSlot, Signature, TensorSlot
from qcompiler.dialects.aten import torch_dtype
from qcompiler.errors import CaptureError, PassError, QCompilerError
from qcompiler.instruments import Dump, Instrument, PrintAfter, TimePasses
from qcompiler.ir import Graph, ScalarType, TensorType, Value
from qcompiler.ir.graph import BUFFER
from qcompiler.pass_manager import Pipeline
from qcompiler.pass_runner import Stages, keep_text, run_pipeline
from qcompiler.report import Report, build_report
from qcompiler.runtime.device import check_target, target_for
from qcompiler.runtime.executable import HostWeights, check_device, run_host
from qcompiler.schemes import pipeline as scheme_pipeline

CPU = torch.device("cpu")
DEFAULT_SCHEME = "fp8_tile"
SELF = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)

_numbers = count()
_capturing = threading.RLock()
"""torch.export keeps global state, and two first calls of one model must not both capture it."""


@dataclass(frozen=True)
class Recipe:
    """How to compile: everything but the model and its inputs."""

    pipeline: Pipeline
    target: str = "auto"
    dynamic_shapes: Any = "auto"
    strict: bool = True
    instruments: tuple[Instrument, ...] = ()


@dataclass(frozen=True)
class Program:
    """What compilation yields: the stages, the report, and the host module with its loaded function."""

    graph: Graph
    stages: Stages
    report: Report
    host: HostModule
    signature: Signature
    device: torch.device
    run: Callable[..., tuple[Any, ...]]


def compile(
    model: "torch.nn.Module | ExportedProgram | Graph",
    *,
    scheme: str = DEFAULT_SCHEME,
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
    check_target(target)
    watching = (*_checked_instruments(instruments), *_instruments_from_environment())
    recipe = Recipe(_pipeline(scheme, pipeline), target, _checked_shapes(dynamic_shapes), strict, watching)
    args, kwargs = _checked_example(example_inputs, example_kwargs)
    given = example_inputs is not None or example_kwargs is not None
    if not isinstance(model, Graph | ExportedProgram):
        check_model(model)
    describe = _forward_of(model)
    if not given and not isinstance(model, Graph | ExportedProgram):
        return _class_of(*describe)(recipe, pending=model)
    captured = _captured(model, args, kwargs, recipe)
    del model  # whoever else holds it may let it go now: the graph has the weights
    program = _build(captured, recipe, captured.signature.flatten(args, kwargs) if given else None)
    compiled = _class_of(*describe)(recipe)
    compiled._accept(program)
    return compiled


# What the caller gave


def _pipeline(scheme: str, pipeline: "Pipeline | str | None") -> Pipeline:
    if pipeline is None:
        return scheme_pipeline(scheme)
    if scheme != DEFAULT_SCHEME:
        fix = f'Edit the scheme\'s own: qcompiler.pipeline("{scheme}").insert_after(...).'
        raise PassError("both a scheme and a pipeline are given", got=f"{scheme!r} and '{pipeline}'", need="one of them", fix=fix)
    if isinstance(pipeline, str):
        return Pipeline.parse(pipeline)
    if not isinstance(pipeline, Pipeline):
        raise PassError("the pipeline is of a wrong type", got=type(pipeline).__name__, need="a Pipeline, or its text")
    return pipeline


def _checked_example(args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args is not None and not isinstance(args, tuple | list):
        fix = "For a single argument, write example_inputs=(x,)."
        raise CaptureError("example_inputs is of a wrong type", got=type(args).__name__, need="a tuple of arguments", fix=fix)
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise CaptureError("example_kwargs is of a wrong type", got=type(kwargs).__name__, need="a dict of arguments by name")
    return tuple(args or ()), dict(kwargs or {})


def _checked_shapes(dynamic_shapes: Any) -> Any:
    if isinstance(dynamic_shapes, str) and dynamic_shapes != "auto":
        raise CaptureError("dynamic_shapes is wrong", got=repr(dynamic_shapes), need='"auto", None, or what torch.export takes')
    return dynamic_shapes


def _checked_instruments(instruments: Any) -> tuple[Instrument, ...]:
    found = tuple(instruments) if isinstance(instruments, tuple | list) else (instruments,)
    if wrong := [item for item in found if not isinstance(item, Instrument)]:
        raise PassError("this is no instrument", got=repr(wrong[0]), need="objects of qcompiler.instruments")
    return found


def _instruments_from_environment() -> Iterator[Instrument]:
    now = knobs.current()
    if now.print_after:
        yield PrintAfter(*now.print_after)
    if now.dump_dir:
        yield Dump(now.dump_dir)
    if now.time_passes:
        yield TimePasses(file=sys.stderr)


# The way from a model to a program


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Neither the caller's autocast nor his inference mode: a graph and its weights outlive both."""
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def _captured(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], recipe: Recipe) -> Captured:
    if isinstance(model, Graph):
        return graph_as_captured(model)
    try:
        with _capturing, _plain_torch():
            return capture(model, args, kwargs, dynamic_shapes=recipe.dynamic_shapes)
    except QCompilerError:
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


def _build(captured: Captured, recipe: Recipe, inputs: Sequence[Any] | None) -> Program:
    graph, signature = captured.graph, captured.signature
    device = signature.device or CPU
    target = target_for(recipe.target, device)
    with _plain_torch():
        done = run_pipeline(recipe.pipeline, graph, instruments=recipe.instruments, inputs=inputs)
        for op in graph.ops(BUFFER):  # the model keeps its own state
            name = str(op.attrs["name"])
            graph.weights[name] = graph.weights[name].clone()
    report = build_report(done.stages, graph, done.reasons)
    if recipe.strict and not report.quantized:
        raise PassError(
            "nothing was quantized",
            got=f"the pipeline '{recipe.pipeline}'",
            need="at least one matmul with a constant operand that a pass quantizes",
            fix=f"Pass strict=False to accept that. What was left alone, and why:\n{report}",
        )
    host, run = _generate(graph, target.name)
    return Program(graph, done.stages, report, host, signature, device, run)


def _generate(graph: Graph, target: str) -> tuple[HostModule, Callable[..., tuple[Any, ...]]]:
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
            fix=f"The graph that it was given is in {keep_text(graph, 'host')}; please report it together with this message.",
        ) from error
    linecache.cache[filename] = (len(host.source), None, host.source.splitlines(True), filename)
    weakref.finalize(run, linecache.cache.pop, filename, None).atexit = False
    return host, run


# The model that comes of it


def _forward_of(model: object) -> tuple[inspect.Signature | None, str | None]:
    """The signature and the documentation of a model's forward, for the compiled model's; None where there is none."""
    try:
        if isinstance(model, Graph):
            either = inspect.Parameter.POSITIONAL_OR_KEYWORD
            return inspect.Signature([SELF, *(inspect.Parameter(value.name, either) for value in model.inputs)]), None
        if isinstance(model, torch.nn.Module):
            found = inspect.signature(model.forward)
            return found.replace(parameters=[SELF, *found.parameters.values()]), model.forward.__doc__
    except (TypeError, ValueError):  # a forward written in C, a name that is no identifier
        pass
    return None, None


def _class_of(signature: inspect.Signature | None, doc: str | None) -> "type[CompiledModel]":
    """A class like CompiledModel whose forward shows a signature: that of a method belongs to its class."""
    if signature is None:
        return CompiledModel

    def forward(self: CompiledModel, *args: Any, **kwargs: Any) -> Any:
        return self._call(args, kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = doc or CompiledModel.forward.__doc__
    names = {"__module__": __name__, "__qualname__": CompiledModel.__qualname__, "__doc__": CompiledModel.__doc__}
    return type(CompiledModel.__name__, (CompiledModel,), {"forward": forward, **names})


class CompiledModel(torch.nn.Module):
    """A quantized model; called as the model it came from, for inference only.

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
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model would answer, from the quantized graph; the first call captures it, if that is still to do.

        No gradients are kept, and autocast is off inside.

        Raises:
            InputError: The arguments are not of the kind that the model was captured for.
        """
        return self._call(args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        program = self._program
        if program is None:
            program = self._compile_now(args, kwargs)
        check_device(self.weights, program.device)
        inputs = program.signature.flatten(args, kwargs)
        return program.signature.unflatten(run_host(program.run, self.weights, inputs))

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
        self.weights = HostWeights(program.host.weights, program.graph.weights, program.device)
        self._recipe = replace(self._recipe, instruments=())  # they may hold what they saw
        self._program = program

    def _compile_now(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        if torch.compiler.is_compiling():
            raise CaptureError("the model is not captured yet", fix="Call it once before torch.compile or torch.export.")
        with _capturing:
            if self._program is not None:  # another thread was first
                return self._program
            (model,) = self._pending
            if model is None:
                raise CaptureError(
                    "compiling failed before, and nobody holds the model any more", fix="Call compile() again with the model."
                )
            check_model(model)
            captured = _captured(model, args, kwargs, self._recipe)
            # While the passes run nobody but the user holds the model, so that its weights can go one by one.
            back = weakref.ref(model)
            self._pending = (None,)
            del model
            try:
                program = _build(captured, self._recipe, captured.signature.flatten(args, kwargs))
            except BaseException:
                self._pending = (back(),)
                raise
            self._accept(program)
            return program

    def train(self, mode: bool = True) -> "CompiledModel":
        """Does nothing: a compiled model is always in evaluation mode, whatever happens to the model around it."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledModel":
        """A copy with tensors of its own; stages and report are shared."""
        twin = memo[id(self)] = type(self)(self._recipe)
        if self._program is None:
            twin._pending = copy.deepcopy(self._pending, memo)
        else:
            graph = self._program.graph.clone()
            for name, tensor in graph.weights.items():
                graph.weights[name] = copy.deepcopy(tensor, memo)
            twin._accept(replace(self._program, graph=graph))
        return twin

    def __copy__(self) -> "CompiledModel":
        """A second handle on the same tensors."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._modules = dict(self._modules)
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses to be pickled."""
        raise QCompilerError(
            "a compiled model cannot be pickled",
            fix="Keep its state_dict(): compile the model again there, and load it; or torch.export.export it and save that.",
        )

    def extra_repr(self) -> str:
        """One line."""
        if self._program is None:
            return f"pipeline='{self.pipeline}', not captured yet"
        return f"pipeline='{self.pipeline}', {self.report.summary()}"
