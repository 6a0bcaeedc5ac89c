"""`capture`: turns a PyTorch model into a `Graph` that is checked against the model.

The steps, one file each:

preflight -> torch.export -> functional ATen -> Graph -> compared with the model at several sizes
"""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from qcompiler.capture.answers import DataDependent, settle, values_of_example
from qcompiler.capture.arguments import MISSING
from qcompiler.capture.attempts import with_fewer_sizes
from qcompiler.capture.caches import has_cache, prepare_caches, static_caches
from qcompiler.capture.check import check_graph
from qcompiler.capture.decompositions import Functional, decompose
from qcompiler.capture.examples import Call, enlarged
from qcompiler.capture.exporting import ALL_OPEN, ANSWERED, export_program
from qcompiler.capture.fixed_sizes import fixed_sizes, specialized_at
from qcompiler.capture.fixing import fixed, related
from qcompiler.capture.huggingface import output_embeddings, register_caches
from qcompiler.capture.importer import device_of_program, guards_of_program, import_program
from qcompiler.capture.preflight import check_inputs, check_model
from qcompiler.capture.python_state import same_attributes
from qcompiler.capture.quiet import third_party_silence
from qcompiler.capture.runs import ModelRefused, does_run
from qcompiler.capture.signature import ConstantSlot, NumberSlot, Signature, Slot, TensorSlot, leaf_paths
from qcompiler.capture.stand_ins import sources_of
from qcompiler.capture.stored_weights import notes_of, readable
from qcompiler.capture.symbols import Symbols
from qcompiler.capture.trials import with_leeway
from qcompiler.errors import CaptureError, CaptureWarning, InputError
from qcompiler.interpreter import interpret
from qcompiler.ir.graph import Graph
from qcompiler.runtime.weights import Weights, named_tensors

REMEDY = (
    "Capture again for other sizes. To keep a size dynamic, avoid Python loops and branches on it; "
    "to fix it without this warning, pass dynamic_shapes."
)


@dataclass(frozen=True)
class Captured:
    """A captured model.

    Attributes:
        graph: The model's computation, over `graph.weights`: views of the model's own tensors.
        signature: Maps call arguments to graph inputs, and graph outputs to the model's return value.
        fixed: What the graph fixes although the model does not, as worded in the warning.
        lines: The source line that made torch fix a size: `dimension 1 of x` -> `model.py:10`.
        notes: Notes for the report, on fixed sizes and on the model's checkpoint.
    """

    graph: Graph
    signature: Signature
    fixed: tuple[str, ...] = ()
    lines: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Interprets the graph op by op for a call of the model; buffers do not change."""
        inputs, without = self.signature.bind(args, kwargs)
        return self.signature.unflatten(interpret(self.graph, inputs), without)


def capture(
    model: torch.nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = "auto",
    check: bool = True,
    allow_meta: bool = False,
) -> Captured:
    """Captures the graph of a model by tracing it with example inputs.

    The model is unchanged: its tensors are shared, never copied, and its buffers and configuration are restored. A
    causal language model of transformers is captured without a key-value cache, unless the call passes `use_cache` or
    a cache.

    Args:
        model: A module in evaluation mode on one device, or the result of torch.export.export.
        args: Positional example inputs: any pytree of tensors, numbers, None and strings.
        kwargs: Example inputs by name.
        dynamic_shapes: "auto": each dimension is dynamic unless the model fixes it. None: only the sizes of the
            examples. Anything else is passed to torch.export.
        check: Whether to compare model and graph at the given sizes and at others. Without the check, dynamic
            dimensions reject sizes 0 and 1, because they were not tested.
        allow_meta: Whether weights may be on the meta device; the graph is then structure only, and not checked.

    Warns:
        CaptureWarning: "auto" fixes sizes that the model does not, or QCOMPILER_CAPTURE_SECONDS was too short to
            capture all dynamic sizes.

    Raises:
        CaptureError: The model cannot be traced, or graph and model differ.
    """
    call: Call = (tuple(args), dict(kwargs or {}))
    if isinstance(model, ExportedProgram):
        return _from_exported(model, call if args or kwargs else model.example_inputs, check)
    check_model(model, allow_meta=allow_meta)
    register_caches(model)
    check_inputs(model, *call)
    with readable(model), same_attributes(model):
        _prepare(model, call)
        captured = _of_module(model, call, dynamic_shapes, check)
        if isinstance(weights := captured.graph.weights, Weights):
            weights.load_later(sources_of(model))
        return replace(captured, notes=(*captured.fixed, *notes_of(model)))


def _of_module(model: torch.nn.Module, call: Call, dynamic_shapes: Any, check: bool) -> Captured:
    """Captures a checked model with as many dynamic sizes as possible."""
    if isinstance(dynamic_shapes, str) and dynamic_shapes != "auto":
        raise CaptureError("dynamic_shapes is not a known keyword", got=repr(dynamic_shapes), need="'auto' or None")
    check = check and not _without_data(model, call)
    if not isinstance(dynamic_shapes, str | None):
        return _captured(model, call, call, dynamic_shapes, check)
    sizes = ALL_OPEN if dynamic_shapes else None
    captured, given_up = with_fewer_sizes(call, lambda shapes: _enlarged(model, call, shapes, check), sizes)
    fixed = [given_up] if given_up else []
    fixed += captured.fixed
    if check and not given_up and sizes is not None:
        fixed += fixed_sizes(model, captured.signature, call, captured.lines, static_caches(call))
    if fixed:
        what = "sizes and values" if captured.fixed else "sizes"
        warnings.warn(CaptureWarning(f"capture fixes {what}: {'; '.join(fixed)}. {REMEDY}"), stacklevel=3)
    return replace(captured, fixed=tuple(fixed))


def _enlarged(model: torch.nn.Module, call: Call, shapes: str | None, check: bool) -> Captured:
    """Captures a model with the first variant of the examples that works."""
    variants = iter([call]) if shapes in (None, ANSWERED) else enlarged(call, partial(does_run, model), has_cache(call))
    errors: list[CaptureError] = []
    for traced in variants:
        try:
            return _captured(model, call, traced, shapes, check)
        except DataDependent:
            raise  # other sizes do not help
        except CaptureError as error:
            errors.append(error)
    raise errors[-1]


def _prepare(model: torch.nn.Module, call: Call) -> None:
    """Allocates static caches; if the model does not run, the trace reports the error in more detail."""
    try:
        prepare_caches(model, call)
    except CaptureError:
        raise
    except Exception:  # the model may raise anything
        return


def _captured(model: torch.nn.Module, call: Call, traced: Call, dynamic_shapes: Any, check: bool) -> Captured:
    """One attempt, with one variant of the examples."""
    program = export_program(model, *traced, dynamic_shapes)
    tensors = {**named_tensors(model), **{k: t for k, t in program.constants.items() if isinstance(t, torch.Tensor)}}
    head = output_embeddings(model)
    roles = {name: "output_embeddings" for name, tensor in tensors.items() if tensor is head}
    answered = dynamic_shapes == ANSWERED
    weights, name = Weights.from_tensors(tensors), type(model).__name__
    captured = _imported(program, weights, name, roles, _parameters(model), answered)
    captured = replace(captured, lines=specialized_at(program))
    return _checked(captured, model, call, traced) if check else captured


def _from_exported(program: ExportedProgram, call: Call | None, check: bool) -> Captured:
    """Captures an exported program, checked against its own module."""
    tensors = {**program.state_dict, **{k: t for k, t in program.constants.items() if isinstance(t, torch.Tensor)}}
    recorded = program.module_call_graph[0].signature
    names = getattr(recorded, "forward_arg_names", None) or ()
    captured = _imported(program, Weights.from_tensors(tensors), "main", {}, tuple((name, MISSING) for name in names))
    if (
        not check
        or call is None
        or any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors.values())
    ):
        return captured
    with third_party_silence():
        module = program.module()
    return _checked(captured, module, call, call)


def _checked(captured: Captured, model: torch.nn.Module, call: Call, traced: Call) -> Captured:
    """Returns the capture with the sizes that the check found to be valid."""
    try:
        signature = check_graph(captured.graph, captured.signature, model, call, traced)
    except ModelRefused as error:
        raise CaptureError("the model does not run on the example inputs", got=error) from error
    captured.graph.symbols = dict(signature.symbols)
    signature = fixed(captured.graph, signature)
    if call is not traced:
        _check_fit(signature, call)
    return replace(captured, signature=with_leeway(captured.graph, signature, model, call))


def _check_fit(signature: Signature, call: Call) -> None:
    """Rejects a graph that was traced at larger sizes, became fixed to them, and does not accept the example."""
    try:
        signature.flatten(*call)
    except InputError as error:
        raise CaptureError("the graph does not accept its own example inputs", got=error) from error


def _imported(
    program: ExportedProgram,
    weights: Weights,
    name: str,
    roles: Mapping[str, str],
    parameters: tuple[tuple[str, Any], ...],
    answered: bool = False,
) -> Captured:
    """Decomposes and imports an exported program."""
    with values_of_example() if answered else nullcontext():
        functional = decompose(program, answered)
    graph, symbols = import_program(functional, weights, name=name, roles=roles)
    signature = related(graph, _signature(functional, graph, symbols, parameters))
    graph.verify()
    return Captured(graph, signature, tuple(settle(graph, program.graph_signature.parameters)))


def _signature(
    program: Functional, graph: Graph, symbols: Symbols, parameters: tuple[tuple[str, Any], ...]
) -> Signature:
    """Returns the calling convention that export recorded."""
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    if in_spec is None or out_spec is None:
        raise CaptureError(
            "the exported program does not record how it is called", got="a CallSpec without in_spec or out_spec"
        )
    paths = _argument_paths(in_spec, [name for name, _ in parameters])
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    specs = [spec.arg for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    inputs = iter(graph.inputs)
    slots: list[Slot] = []
    for path, arg in zip(paths, specs, strict=True):
        if isinstance(arg, ConstantArgument):
            slots.append(ConstantSlot(path, arg.value))
            continue
        value, name = values[arg.name], next(inputs).name
        if isinstance(value, torch.Tensor):
            shape = tuple(symbols.size(n) for n in value.shape)
            slots.append(TensorSlot(path, name, value.dtype, value.device, shape))
        else:
            slots.append(NumberSlot(path, name, symbols.value(value) if isinstance(value, torch.SymInt) else None))
    conditions = symbols.conditions(guards_of_program(program))
    return Signature(in_spec, out_spec, tuple(slots), graph.symbols, parameters, device_of_program(program), conditions)


def _argument_paths(spec: pytree.TreeSpec, names: list[str]) -> list[str]:
    """Returns each flat argument as a user would write it: `input_ids`, `batch['mask']`."""
    args, kwargs = spec.children()
    heads = [names[i] if i < len(names) else f"args[{i}]" for i in range(args.num_children)] + list(
        kwargs.context or []
    )
    parts = zip(heads, [*args.children(), *kwargs.children()], strict=True)
    return [f"{head}{rest}" for head, part in parts for rest in leaf_paths(part)]


def _parameters(model: torch.nn.Module) -> tuple[tuple[str, Any], ...]:
    """Returns the names and default values of forward's parameters that can be passed by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(model.forward).parameters.values()
    return tuple((p.name, MISSING if p.default is p.empty else p.default) for p in found if p.kind in kinds)


def _without_data(model: torch.nn.Module, call: Call) -> bool:
    """Whether a weight or an input has no data, so that nothing can be run."""
    tensors = [*named_tensors(model).values(), *(x for x in pytree.tree_leaves(call) if isinstance(x, torch.Tensor))]
    return any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors)
