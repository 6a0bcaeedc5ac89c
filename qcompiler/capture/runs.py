"""Runs a model and its graph on the same call, and returns all results by name."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qcompiler.capture.bounds import BoundsCheck
from qcompiler.capture.examples import Call, map_tensors
from qcompiler.capture.huggingface import tracing_settings
from qcompiler.capture.quiet import third_party_silence
from qcompiler.capture.signature import Signature, TensorSlot
from qcompiler.errors import CaptureError, QCompilerError
from qcompiler.interpreter import interpret
from qcompiler.ir.graph import BUFFER, Graph


class ModelRefused(Exception):
    """The model itself does not run at these sizes."""


class GraphRefused(CaptureError):
    """The graph does not run at sizes at which the model does; an error, but not a silent one."""


class Runs:
    """Runs a model and its graph side by side.

    Args:
        graph: The captured graph.
        signature: Its calling convention.
        model: The captured model. Buffers that it writes are restored after each run.
    """

    def __init__(self, graph: Graph, signature: Signature, model: torch.nn.Module) -> None:
        self.graph, self.signature, self.model = graph, signature, model
        self.buffers = [str(op.attrs["name"]) for op in graph.ops(BUFFER)]
        self.targets = [op["target"] for op in graph.updates]
        self.paths = signature.output_paths()

    def of_model(
        self, call: Call, mode: AbstractContextManager[Any] | None = None, enter: "Entrance" = torch.clone
    ) -> dict[str, Any]:
        """Runs the model; returns outputs, and new values of buffers and inputs.

        Args:
            call: The arguments, which are not changed.
            mode: A dispatch mode for the run.
            enter: Applied to each input tensor and to each buffer that the model writes; returns a new tensor.

        Raises:
            ModelRefused: The model does not run on this call.
        """
        with self._surroundings(mode):
            args, kwargs = map_tensors(enter, call)
            passed = dict(self.named_tensors((args, kwargs)))  # the model may change its inputs in place
            with restored(self.model, self.buffers, enter), tracing_settings(self.model, kwargs):
                try:
                    out = self.model(*args, **kwargs)
                except Exception as error:  # the model may raise anything at unsupported sizes
                    raise ModelRefused(str(error)) from error
                buffers = dict(self.model.named_buffers())
                found = self._named_outputs(pytree.tree_leaves(out))
                for target in self.targets:
                    name = target.op.attrs.get("name")
                    new = passed[target.name] if name is None else buffers[str(name)].clone()
                    found[f"the new {target.name}"] = new
            return found

    def _named_outputs(self, leaves: list[Any]) -> dict[str, Any]:
        if len(leaves) != len(self.paths):
            raise CaptureError(
                "the model returns a different structure than in the trace",
                got=f"{len(leaves)} tensors and numbers",
                need=f"{len(self.paths)}, as in the trace",
                fix="A graph cannot contain state in a Python object, such as a cache that counts its tokens.",
            )
        return dict(zip(self.paths, leaves, strict=True))

    def returned(
        self, call: Call, mode: AbstractContextManager[Any] | None = None, enter: "Entrance" = torch.clone
    ) -> Any:
        """Returns the model's result for a call of any structure; ModelRefused if the model does not accept it."""
        with self._surroundings(mode):
            args, kwargs = map_tensors(enter, call)
            with restored(self.model, self.buffers, enter), tracing_settings(self.model, kwargs):
                try:
                    return self.model(*args, **kwargs)
                except Exception as error:  # the model may raise anything for unsupported arguments
                    raise ModelRefused(str(error)) from error

    def of_graph(
        self, call: Call, mode: AbstractContextManager[Any] | None = None, enter: "Entrance" = torch.clone
    ) -> dict[str, Any]:
        """Runs the graph and returns the same results; GraphRefused if it does not run."""
        with self._surroundings(mode):
            leaves = pytree.tree_leaves(map_tensors(enter, call))
            inputs = [leaf for slot, leaf in zip(self.signature.slots, leaves, strict=True) if hasattr(slot, "name")]
            updates: dict[str, torch.Tensor] = {}
            try:
                outputs = interpret(self.graph, inputs, updates=updates)
            except QCompilerError as error:
                raise GraphRefused("the captured graph does not run", got=error) from error
            return {
                **dict(zip(self.paths, outputs, strict=True)),
                **{f"the new {name}": new for name, new in updates.items()},
            }

    def named_tensors(self, call: Call) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the tensors of a call, by the names of the graph's inputs."""
        for slot, leaf in zip(self.signature.slots, pytree.tree_leaves(call), strict=True):
            if isinstance(slot, TensorSlot):
                yield slot.name, leaf

    @contextmanager
    def _surroundings(self, mode: AbstractContextManager[Any] | None) -> Iterator[None]:
        """Uses the same random numbers in every run, and restores the user's generators."""
        device = self.signature.device
        cuda = [device] if device is not None and device.type == "cuda" else []
        bounds = BoundsCheck() if cuda else nullcontext()
        with torch.no_grad(), third_party_silence(), torch.random.fork_rng(devices=cuda):
            torch.manual_seed(torch.initial_seed())
            with mode or nullcontext(), bounds:
                yield


Entrance = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def restored(model: torch.nn.Module, names: Iterable[str], enter: Entrance = torch.clone) -> Iterator[None]:
    """Restores the buffers that a model run writes, in place or by assignment."""
    before = []
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        before.append((module, leaf, getattr(module, leaf)))
    copies = [enter(buffer) for _, _, buffer in before]
    in_place = enter is torch.clone  # otherwise the run uses the copies, which may be wider than the buffers
    try:
        for (module, leaf, _), copy in zip(before, copies, strict=True):
            if not in_place:
                setattr(module, leaf, copy)
        yield
    finally:
        for (module, leaf, buffer), copy in zip(before, copies, strict=True):
            if in_place:
                buffer.copy_(copy)
            setattr(module, leaf, buffer)


def run_aside(model: torch.nn.Module, call: Call) -> None:
    """Runs a model on a call for its side effects on the arguments.

    Raises:
        Exception: Any error of the model.
    """
    names = [name for name, _ in model.named_buffers()]
    cuda = any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in pytree.tree_leaves(call))
    bounds = BoundsCheck() if cuda else nullcontext()
    with torch.no_grad(), third_party_silence(), restored(model, names), tracing_settings(model, call[1]), bounds:
        model(*call[0], **call[1])


def does_run(model: torch.nn.Module, call: Call) -> bool:
    """Whether a model runs on a call; the call's tensors are not changed."""
    try:
        run_aside(model, map_tensors(torch.clone, call))
    except Exception:  # the model may raise anything at unsupported sizes
        return False
    return True
