"""Holds a captured graph to the model: same outputs, same updates, at several sizes; and finds the least legal sizes.

torch.export assumes that no dynamic size is 0 or 1. The graph is tried there as well: where it agrees with the model,
the range of the symbol is widened; where it does not, the range says so and a call of that size is refused.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qcompiler.capture.bounds import BoundsCheck
from qcompiler.capture.examples import Call, map_tensors, sizes_of, with_sizes
from qcompiler.capture.huggingface import tracing_settings
from qcompiler.capture.quiet import third_party_silence
from qcompiler.capture.signature import Signature, TensorSlot
from qcompiler.errors import CaptureError, QCompilerError
from qcompiler.interpreter import interpret
from qcompiler.ir.graph import BUFFER, UPDATE, Graph, Range

TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}
"""Largest difference, relative to the largest entry. The same operators run on both sides, so that most outputs are
equal bit for bit; what remains is memory formats and another implementation of experts, which sum in another order."""

ASSUMED_LOW = 2
"""The least size that torch.export reckons with."""


STEPS = (-1, 2, -3, 4, 8, 16)
"""How far sizes are moved for the second comparison; some models take only multiples."""

MOST_ALONE = 8
"""With more symbols than this (a cache has one a layer), they are tried at 1 in groups of equal size only."""


class ModelRefused(Exception):
    """The model itself does not run at these sizes."""


class GraphRefused(CaptureError):
    """The graph does not run at sizes where the model does: wrong, but never silently so."""


def check_graph(graph: Graph, signature: Signature, model: torch.nn.Module, call: Call, traced: Call) -> Signature:
    """Compares graph and model at the given sizes, at other ones, and at 1 and 0.

    Args:
        graph: What was captured.
        signature: How it is called.
        model: What it was captured from; buffers that it writes are restored after each run.
        call: The user's example.
        traced: The example that was traced with, where sizes of 1 may be larger.

    Returns:
        The signature with the ranges of the symbols, widened or narrowed by what was found, and without the conditions
        that do not matter.

    Raises:
        CaptureError: They differ; the message has the output, the shapes and the difference.
        ModelRefused: The model does not run on the example.
    """
    judge = _Judge(graph, signature, model)
    ranges = dict(signature.symbols)
    sizes = sizes_of(signature, traced)
    judge.compare(traced)
    for symbol in _unmovable(sizes, ranges, judge, traced):
        ranges[symbol] = Range(sizes[symbol], sizes[symbol])
    for low in (1, 0):
        for symbol in _agreeing(judge, traced, sizes, low, ranges):
            ranges[symbol] = Range(low, ranges[symbol].high)
    given = sizes_of(signature, call)
    if given != sizes:
        judge.compare(call)
        ranges.update({s: Range(n, ranges[s].high) for s, n in given.items() if s in ranges and n < ranges[s].low})
    conditions = tuple(c for c in signature.conditions if all(c.holds(agreed) for agreed in judge.agreed))
    return replace(signature, symbols=ranges, conditions=conditions)


def _unmovable(sizes: Mapping[str, int], ranges: Mapping[str, Range], judge: "_Judge", call: Call) -> list[str]:
    """Compares at a second value of each symbol; the symbols of which the model takes no other value.

    Nothing is known about the graph at other values of those.
    """
    if _try_moves(list(sizes), sizes, ranges, judge, call):
        return []
    # Some pair of sizes does not fit together, such as a cache and its mask: move one at a time.
    return [symbol for symbol in sizes if not _try_moves([symbol], sizes, ranges, judge, call)]


def _try_moves(
    moving: list[str], sizes: Mapping[str, int], ranges: Mapping[str, Range], judge: "_Judge", call: Call
) -> bool:
    """Whether graph and model agree with `moving` at other sizes: smaller ones first, as tables of positions end."""
    for step in STEPS:
        moved = {**sizes, **{symbol: sizes[symbol] + step for symbol in moving}}
        for symbol in moving:  # where the step leads out of the legal sizes, go the other way
            if not _legal(moved[symbol], ranges.get(symbol)):
                moved[symbol] = sizes[symbol] - step
        if not all(_legal(moved[symbol], ranges.get(symbol)) for symbol in moving):
            continue
        if all(condition.holds(moved) for condition in judge.signature.conditions) and judge.try_compare(call, moved):
            return True
    return not moving


def _legal(size: int, bounds: Range | None) -> bool:
    return size >= ASSUMED_LOW and (bounds is None or size in bounds)


def _agreeing(
    judge: "_Judge", call: Call, sizes: Mapping[str, int], low: int, ranges: Mapping[str, Range]
) -> list[str]:
    """The symbols that may be `low`: the graph agreed with the model there, alone or with others, and never differed.

    A batch may have several symbols (ids and mask), and nothing may run when only one of them is 1. They are tried one
    at a time, together with those of the same size in the example, and all at once.
    """
    free = [symbol for symbol in sizes if ranges[symbol].low == low + 1 and ranges[symbol].low != ranges[symbol].high]
    groups = [[symbol] for symbol in free] if len(free) <= MOST_ALONE else []
    groups += [[other for other in free if sizes[other] == sizes[symbol]] for symbol in free]
    groups += [free]
    agreed: set[str] = set()
    wrong: set[str] = set()
    for group in {tuple(group): None for group in groups if group}:
        if wrong & set(group):
            continue  # already explained
        try:
            if judge.try_compare(call, {**sizes, **dict.fromkeys(group, low)}):
                agreed.update(group)
        except GraphRefused:
            continue
        except CaptureError:
            wrong.update(group)
    return [symbol for symbol in free if symbol in agreed - wrong]


class _Judge:
    """Runs graph and model on the same inputs and compares all that comes out."""

    def __init__(self, graph: Graph, signature: Signature, model: torch.nn.Module) -> None:
        self.graph, self.signature, self.model = graph, signature, model
        self.buffers = [str(op.attrs["name"]) for op in graph.ops(BUFFER)]
        self.targets = [op.tensor(0) for op in graph.ops(UPDATE)]
        self.paths = signature.output_paths()
        self.agreed: list[dict[str, int]] = []

    def try_compare(self, call: Call, sizes: Mapping[str, int]) -> bool:
        """Compares at other sizes; False when the example or the model does not allow them."""
        varied = with_sizes(self.signature, call, sizes)
        if varied is None:
            return False
        try:
            self.compare(varied)
        except ModelRefused:
            return False
        return True

    def compare(self, call: Call) -> None:
        """Raises CaptureError when graph and model differ on a call, ModelRefused when the model does not run."""
        cuda = _cuda_devices(self.signature)
        bounds = BoundsCheck() if cuda else nullcontext()
        with torch.no_grad(), third_party_silence(), torch.random.fork_rng(devices=cuda), bounds:
            seed = torch.initial_seed()
            torch.manual_seed(seed)
            want = self._run_model(map_tensors(torch.clone, call))
            torch.manual_seed(seed)
            got = self._run_graph(map_tensors(torch.clone, call))
        shapes = ", ".join(f"{slot.name}{list(leaf.shape)}" for slot, leaf in self._tensors(call))
        for what, value in want.items():
            _compare(what, got.get(what), value, shapes)
        self.agreed.append(sizes_of(self.signature, call))

    def _run_graph(self, call: Call) -> dict[str, Any]:
        leaves = pytree.tree_leaves(call)
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

    def _run_model(self, call: Call) -> dict[str, Any]:
        args, kwargs = call
        passed = {slot.name: leaf for slot, leaf in self._tensors(call)}  # the model changes its inputs in place
        with _restored(self.model, self.buffers), tracing_settings(self.model, kwargs):
            try:
                out = self.model(*args, **kwargs)
            except Exception as error:  # anything a model may raise at sizes that it does not take
                raise ModelRefused(str(error)) from error
            buffers = dict(self.model.named_buffers())
            found = dict(zip(self.paths, pytree.tree_leaves(out), strict=True))
            for target in self.targets:
                name = target.op.attrs.get("name")
                new = passed[target.name] if name is None else buffers[str(name)].clone()
                found[f"the new {target.name}"] = new
        return found

    def _tensors(self, call: Call) -> Iterator[tuple[TensorSlot, torch.Tensor]]:
        for slot, leaf in zip(self.signature.slots, pytree.tree_leaves(call), strict=True):
            if isinstance(slot, TensorSlot):
                yield slot, leaf


def _compare(what: str, got: Any, want: Any, shapes: str) -> None:
    problem = f"the captured graph does not compute what the model computes: {what} differs"
    if not isinstance(want, torch.Tensor) or not isinstance(got, torch.Tensor):
        if got != want and not (isinstance(want, float) and want != want):
            raise CaptureError(problem, got=got, need=want, where=shapes)
        return
    if got.shape != want.shape or got.dtype != want.dtype:
        kinds = [f"{t.dtype} of shape {tuple(t.shape)}" for t in (got, want)]
        raise CaptureError(problem, got=kinds[0], need=kinds[1], where=shapes)
    same = (got == want) | (got != got) & (want != want)
    if bool(same.all()):
        return
    difference = (got[~same].double() - want[~same].double()).abs().max().item()
    largest = want[torch.isfinite(want)].abs().max().item() if bool(torch.isfinite(want).any()) else 0.0
    limit = TOLERANCE.get(want.dtype, 0.0) * largest
    if not difference <= limit:
        raise CaptureError(
            problem,
            got=f"a largest difference of {difference:.3g}",
            need=f"at most {limit:.3g}",
            where=shapes,
            fix="A Python branch on a size, or state outside of buffers, may have been traced for one case only; "
            "dynamic_shapes=None captures the given sizes alone.",
        )


@contextmanager
def _restored(model: torch.nn.Module, names: list[str]) -> Iterator[None]:
    """Puts back the buffers that a run of the model writes, whether in place or by another tensor."""
    before = []
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        buffer = getattr(module, leaf)
        before.append((module, leaf, buffer, buffer.clone()))
    try:
        yield
    finally:
        for module, leaf, buffer, copy in before:
            buffer.copy_(copy)
            setattr(module, leaf, buffer)


def _cuda_devices(signature: Signature) -> list[torch.device]:
    return [signature.device] if signature.device is not None and signature.device.type == "cuda" else []
