"""Model -> ExportedProgram: tries several ways to trace, and raises one clear error if all fail."""

import linecache
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from qcompiler.capture.answers import DataDependent, answers_of_example
from qcompiler.capture.huggingface import pretrained_model, tracing_patches, tracing_settings
from qcompiler.capture.locations import user_line
from qcompiler.capture.python_state import same_attributes
from qcompiler.capture.quiet import quiet_failure, third_party_silence
from qcompiler.capture.torch_layers import idle_conversions, masks_as_given
from qcompiler.errors import CaptureError

DATA_DEPENDENT = frozenset(
    {
        "GuardOnDataDependentSymNode",
        "DataDependentOutputException",
        "DynamicOutputShapeException",
        "PendingUnbackedSymbolNotFound",
    }
)
"""Torch's errors for data-dependent control flow; by name, because the classes move between versions."""


ALL_OPEN = "auto"
"""Makes every size dynamic; the model fixes those that it must."""

FLAT_OPEN = "flat"
"""The same without the heights, widths and depths of images."""

ANSWERED = "answered"
"""Fixes every size, and the answers to the code's questions about data: see `answers`."""


class Untraceable(CaptureError):
    """torch.export fails, possibly because of dynamic sizes."""


Attempt = tuple[Callable[[], AbstractContextManager[None]], bool]
"""Context managers for the trace, and whether to use strict mode."""


def export_program(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any = "auto"
) -> ExportedProgram:
    """Traces a model with torch.export: plainly first, then with transformers' patches, then in strict mode.

    A Hugging Face causal model is captured without a key-value cache, unless `kwargs` has `use_cache` or a cache; see
    `huggingface.tracing_settings`. The model and its configuration are restored afterwards.

    Args:
        model: In evaluation mode; see `preflight.check_model`.
        args: Positional example inputs.
        kwargs: Example inputs by name.
        dynamic_shapes: ALL_OPEN, FLAT_OPEN or ANSWERED; None fixes all sizes; anything else is passed to torch.export
            unchanged.

    Raises:
        CaptureError: All attempts failed. For data-dependent control flow, the message quotes the user's line.
    """
    ours = dynamic_shapes is None or isinstance(dynamic_shapes, str)
    args, kwargs = pytree.tree_map(_copies(model, keep=not ours), (tuple(args), dict(kwargs)))
    answered = dynamic_shapes == ANSWERED
    shapes: Any = None if answered else dynamic_shapes
    if isinstance(shapes, str):
        shapes = automatic_shapes(args, kwargs, shapes == FLAT_OPEN)
    errors: list[Exception] = []
    named = named_keywords(model, kwargs) if isinstance(dynamic_shapes, str) else nullcontext()
    with torch.no_grad(), tracing_settings(model, kwargs), third_party_silence(), named, masks_as_given():
        for context, strict in _attempts(model):
            if answered and strict:
                break  # dynamo does not ask tensors for answers; it analyzes the model's bytecode
            answers = answers_of_example() if answered else nullcontext()
            try:
                kept = same_attributes(model, remove_new=True)
                with context(), quiet_failure(), kept, idle_conversions(), answers:
                    return torch.export.export(model, tuple(args), dict(kwargs), dynamic_shapes=shapes, strict=strict)
            except Exception as error:  # torch or the model may raise anything; it becomes one sentence below
                errors.append(error)
    raise explain(errors[0]) from errors[0]


def _copies(model: torch.nn.Module, keep: bool) -> Callable[[Any], Any]:
    """Returns a function that copies tensors before torch.export sees them, and returns other leaves unchanged.

    torch.export marks on a tensor which sizes are dynamic, and the next export reads the marks. It also identifies
    tensors by object: for `model(input_ids=ids, labels=ids)` the graph would read the labels for both. torch 2.11 also
    guards on the sizes of a view's base tensor.

    Args:
        model: Its parameters and buffers may also be arguments.
        keep: Whether to keep a tensor that does not need a copy for the last two reasons: a user's own dynamic_shapes
            may refer to it.
    """
    seen = {id(tensor) for tensors in (model.parameters(), model.buffers()) for tensor in tensors}

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if keep and id(leaf) not in seen and not leaf._is_view():
            seen.add(id(leaf))
            return leaf
        return leaf.clone()

    return copied


def automatic_shapes(args: Sequence[Any], kwargs: Mapping[str, Any], flat: bool = False) -> ShapesCollection:
    """Makes every dimension of every tensor dynamic, except sizes 0 and 1, which torch treats as constants.

    Args:
        args: Positional example inputs.
        kwargs: Example inputs by name.
        flat: Whether to fix the `spatial_axes` of arguments too.
    """
    shapes = ShapesCollection()
    direct = {id(x) for x in (*args, *kwargs.values())}  # not the tensors inside a cache
    for leaf in pytree.tree_leaves((tuple(args), dict(kwargs))):
        if isinstance(leaf, torch.Tensor):
            fixed = spatial_axes(leaf) if flat and id(leaf) in direct else ()
            shapes[leaf] = {
                axis: Dim.AUTO if n > 1 and axis not in fixed else Dim.STATIC for axis, n in enumerate(leaf.shape)
            }
    return shapes


def spatial_axes(tensor: torch.Tensor) -> range:
    """Returns the dimensions after batch and channels of a tensor that may be an image."""
    return range(2, tensor.ndim) if tensor.is_floating_point() and tensor.ndim >= 4 else range(0)


@contextmanager
def named_keywords(model: torch.nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Temporarily shows `**kwargs` of a forward as the names that this call passes.

    torch.export looks up shapes of such arguments both under their own names and under the name of the dictionary.
    """
    found = signature(model.forward)
    rest = [name for name in kwargs if name not in found.parameters]
    named = [p for p in found.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    if not rest or len(named) == len(found.parameters):
        yield
        return
    before = vars(model).get("forward")
    shown: Any = partial(model.forward)  # adds no frame to the traces of the model's code
    shown.__signature__ = found.replace(parameters=[*named, *(Parameter(n, Parameter.KEYWORD_ONLY) for n in rest)])
    model.forward = shown
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


def explain(error: BaseException) -> CaptureError:
    """Explains a trace failure in one sentence with the user's line."""
    chain = list(_chain(error))
    if isinstance(error, CaptureError):
        return error
    line = next((found for link in reversed(chain) if (found := user_line(link.__traceback__))), None)
    where = None
    if line is not None:
        where = f"{line}: {linecache.getline(line.file, line.line).strip()}"
    if any(type(link).__name__ in DATA_DEPENDENT for link in chain):
        return DataDependent(
            "the model's control flow depends on tensor values, which a graph cannot represent",
            where=where,
            fix="Replace the Python if, loop or .item() there with tensor operations such as torch.where, or capture a "
            "part of the model around it.",
        )
    root = chain[-1]
    message = str(root).strip().split("\n")[0].rstrip(".")
    if name := _opaque_output(root, message):
        fix = f"Call torch.export.register_dataclass({name.split('.')[-1]}) first, or return a tuple or a dict."
        return CaptureError("the model returns an object of a type that torch.export cannot flatten", got=name, fix=fix)
    return Untraceable("the model cannot be traced", got=f"{type(root).__name__}: {message}", where=where)


def _opaque_output(error: BaseException, message: str) -> str | None:
    """Returns the class of an output that is not a pytree, if that caused the error."""
    found = re.search(r"Found <class '([^']*)'> in output, which is not a known type", message)
    if found is None and "weakref.py" in [Path(frame.filename).name for frame in extract_tb(error.__traceback__)[-1:]]:
        found = re.search(r"unhashable type: '(\w+)'", message)  # torch 2.11 puts outputs into a weak set
    return found[1].removeprefix("__main__.") if found else None


def _attempts(model: torch.nn.Module) -> Iterator[Attempt]:
    yield nullcontext, False
    if pretrained_model(model) is not None:
        yield (lambda: tracing_patches(model)), False
    yield nullcontext, True


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields the error, its cause, and so on down to the root."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
