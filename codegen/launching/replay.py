"""Records the launches of an operator, and replays them for other operands of the same description.

Host work of an operator (checks, choice of a configuration, strides, constants) depends on the shapes, strides, element
types and alignment of its operands, never on their values. So a call is recorded: which tensors it allocated, and which
kernels it launched on what. A later call repeats the allocations and launches with the new addresses, and skips the
code in between. Recording starts with the second call for given shapes, because many shapes occur only once, such as
prompt lengths.

    def scale_rows(x, factor):
        out = replay.empty(x.shape, x.dtype, x.device)
        launch(kernel, …, (x, factor, out), …)
        return out

    replayed(scale_rows, "scale_rows", (x, factor), x, factor)

Calls are recorded only if every tensor passed to a kernel lies in an operand or comes from `empty`. An operator that
copies an operand first, or runs one of torch's operators, simply runs again.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from codegen.launching.enqueue import MAPS, Encoder, Kernel, current_device, current_stream, hooked
from codegen.launching.recent import Recent

Result = TypeVar("Result", bound=Tensor | tuple[Tensor, ...])


class _State(threading.local):
    """The current activity of this thread.

    Attributes:
        tape: Records launches and allocations while a call is recorded.
        planner: Receives each kernel call that is not compiled yet, with its key; nothing is launched meanwhile. Set
            while the kernels of a call are collected.
        problems: Collects each distinct GEMM while the GEMMs of a call are listed.
    """

    tape: "_Tape | None" = None
    planner: Callable[[Hashable, Any], None] | None = None
    problems: dict[Any, None] | None = None


state = _State()


class _Place(NamedTuple):
    """The origin of an argument's address: an offset in bytes from the start of an operand or allocation."""

    slot: int
    source: int
    offset: int


class _Descriptor(NamedTuple):
    """The origin of an encoded descriptor."""

    slot: int
    source: int
    offset: int
    encode: Encoder
    description: tuple[int, ...]


class _Launch(NamedTuple):
    """One launch, complete except for addresses."""

    kernel: Kernel
    call: Callable[..., None]
    template: list[Any]
    places: tuple[_Place, ...]
    descriptors: tuple[_Descriptor, ...]


class _Plan(NamedTuple):
    """The recorded allocations and launches of a call."""

    device: int
    makers: tuple[Callable[[], Tensor], ...]
    launches: tuple[_Launch, ...]
    results: tuple[int, ...]
    single: bool

    def run(self, addresses: list[int]) -> Any:
        """Allocates and launches for operands at these addresses; returns the result of the call."""
        if current_device() != self.device:
            with torch.cuda.device(self.device):
                return self.run(addresses)
        made = [make() for make in self.makers]
        addresses += [tensor.data_ptr() for tensor in made]
        stream = current_stream(self.device)
        for kernel, call, template, places, descriptors in self.launches:
            ready = template.copy()
            for slot, source, offset in places:
                ready[slot] = addresses[source] + offset
            for slot, source, offset, encode, description in descriptors:
                address = addresses[source] + offset
                ready[slot] = MAPS.young.get((description, address)) or encode(description, address)
            if kernel.listed:
                call(stream, *kernel.head, ready)
            else:
                call(stream, *kernel.head, *ready)
        return made[self.results[0]] if self.single else tuple([made[index] for index in self.results])


class _Known(NamedTuple):
    """A plan and the operands it applies to.

    Attributes:
        alignment: The operands' addresses modulo 16 bytes.
        apart: For operands that share memory, such as the halves of one GEMM result: bytes from the first to the
            second. If that is equal, an address may be computed from either of them.
        fits: Compares everything else.
        plan: The recorded work.
    """

    alignment: list[int]
    apart: tuple[tuple[int, int, int], ...]
    fits: Callable[..., bool]
    plan: _Plan

    def lie_right(self, addresses: Sequence[int]) -> bool:
        """Whether operands that share memory are at the same distance as when recorded."""
        return all(addresses[second] - addresses[first] == distance for first, second, distance in self.apart)


_KNOWN: Recent[list[_Known]] = Recent(2048)
"""(what, shapes) -> recorded calls: none after the first call, and a few that differ in strides or types."""

MOST_VARIANTS = 8
"""Maximum recorded calls of one operator for operands of the same shapes."""


def forget() -> None:
    """Forgets all calls, because operators may now act differently on the same operands."""
    _KNOWN.clear()


def replayed(run: Callable[..., Result], what: Hashable, operands: Sequence[Tensor | None], *arguments: Any) -> Result:
    """Runs `run(*arguments)`, or replays the launches of an earlier such call.

    Args:
        run: An operator on a CUDA device; it returns tensors that it got from `empty`: one, a tuple, or ().
        what: Everything that its launches depend on besides the operands, including the operator's name.
        operands: All tensors among the arguments.
        arguments: The arguments of `run`.
    """
    if state.tape is not None:
        state.tape.whole = False  # separately recorded launches are not part of the enclosing call
    if state.planner is not None or hooked():
        return run(*arguments)
    given = [tensor for tensor in operands if tensor is not None]
    addresses = [tensor.data_ptr() for tensor in given]
    key = (what, *[None if tensor is None else tensor.shape for tensor in operands])
    known = _KNOWN.get(key)
    if known is None:
        _KNOWN.put(key, [])
        return run(*arguments)
    alignment = [address & 15 for address in addresses]
    for each in known:
        if each.alignment == alignment and each.fits(*given) and each.lie_right(addresses):
            result: Result = each.plan.run(addresses)
            return result
    outer, state.tape = state.tape, _Tape(given)
    try:
        made = run(*arguments)
        plan = state.tape.plan(made)
    finally:
        state.tape = outer
    if plan is not None:
        new = _Known(alignment, _distances(given), _comparison(given), plan)
        _KNOWN.put(key, [new, *known[: MOST_VARIANTS - 1]])
    return made


def _distances(tensors: Sequence[Tensor]) -> tuple[tuple[int, int, int], ...]:
    """Pairs of tensors that share memory (the first and each other one), with the bytes between their starts."""
    first: dict[int, int] = {}
    pairs = []
    for index, tensor in enumerate(tensors):
        before = first.setdefault(tensor.untyped_storage().data_ptr(), index)
        if before != index:
            pairs.append((before, index, tensor.data_ptr() - tensors[before].data_ptr()))
    return tuple(pairs)


def _comparison(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A check whether other tensors have the same shapes, strides, element types and devices.

    Uses torch.compile's C++ guard if torch has it: checking attributes one by one takes as long as a launch.
    """
    guards = getattr(torch._C._dynamo.guards, "TensorGuards", None)
    if guards is not None:
        sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
        check: Callable[..., bool] = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        return check
    wanted = [(t.shape, t.stride(), t.dtype, t.device) for t in tensors]
    return lambda *given: [(t.shape, t.stride(), t.dtype, t.device) for t in given] == wanted


def empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, strides: Sequence[int] | None = None
) -> Tensor:
    """Uninitialized memory for a result or partial sums; contiguous unless `strides` are given.

    Only kernels run by `launch` may write to it: a replayed call runs no torch operators.
    """
    made = (
        torch.empty(shape, dtype=dtype, device=device)
        if strides is None
        else torch.empty_strided(shape, strides, dtype=dtype, device=device)
    )
    if state.tape is not None:
        state.tape.made.append(made)
    return made


class _Tape:
    """Records one call."""

    def __init__(self, operands: Sequence[Tensor]) -> None:
        self.operands, self.made, self.whole = operands, list[Tensor](), True
        self._launches: list[tuple[Kernel, int, Sequence[Any]]] = []

    def note(self, kernel: Kernel, programs: int, arguments: Sequence[Any]) -> None:
        """One launch."""
        self._launches.append((kernel, programs, arguments))

    def plan(self, returned: Tensor | tuple[Tensor, ...]) -> _Plan | None:
        """The plan to repeat the call; None if that is not possible."""
        results = returned if isinstance(returned, tuple) else (returned,)
        indices = [next((i for i, each in enumerate(self.made) if each is result), None) for result in results]
        starts = self._starts()
        if not self.whole or None in indices or not self._launches:
            return None
        launches = [_launch(*each, starts) for each in self._launches]
        if None in launches:
            return None
        whole: Any = (tuple(map(_maker, self.made)), tuple(launches), tuple(indices), isinstance(returned, Tensor))
        return _Plan(self.operands[0].get_device(), *whole)

    def _starts(self) -> dict[int, tuple[int, int]]:
        """Storage -> the operand (the first of several) or allocation that starts in it, and where."""
        starts: dict[int, tuple[int, int]] = {}
        for index, tensor in enumerate((*self.operands, *self.made)):
            if tensor.numel():
                starts.setdefault(tensor.untyped_storage().data_ptr(), (index, tensor.data_ptr()))
        return starts


def _maker(tensor: Tensor) -> Callable[[], Tensor]:
    """Makes an empty tensor like this one; on the current device, and without torch's dispatcher if possible."""
    sizes, strides = tuple(tensor.shape), tensor.stride()
    quick = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None) if tensor.is_cuda else None
    if quick is not None:
        return partial(quick, sizes, strides, tensor.dtype)
    return partial(torch.empty_strided, sizes, strides, dtype=tensor.dtype, device=tensor.device)


def _launch(
    kernel: Kernel, programs: int, arguments: Sequence[Any], starts: dict[int, tuple[int, int]]
) -> _Launch | None:
    """A launch with the origins of its addresses; None if a tensor is unknown or Triton's regular launch is used."""
    if kernel.path == "plain":
        return None
    places: list[_Place] = []
    descriptors: list[_Descriptor] = []
    template: list[Any] = []
    for argument, encoder in zip(arguments, kernel.encoders, strict=True):
        tensor = argument if encoder is None else argument.base
        if not isinstance(tensor, Tensor):
            template.append(argument)
            continue
        found = starts.get(tensor.untyped_storage().data_ptr())
        if found is None:
            return None
        source, start = found
        slot, offset = len(template), tensor.data_ptr() - start
        template.append(0)
        if encoder is None:
            places.append(_Place(slot, source, offset))
        else:
            description = encoder.describe(argument.shape, argument.strides)
            descriptors.append(_Descriptor(slot, source, offset, encoder, description))
            template += [*argument.shape, *argument.strides]
    call, template = partial(kernel.raw, programs, 1, 1), [*template, *kernel.constants]
    return _Launch(kernel, call, template, tuple(places), tuple(descriptors))
