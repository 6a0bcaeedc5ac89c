"""A compiled kernel and the Triton C function that enqueues it, called with prepared arguments.

Triton's regular launch looks up hooks and metadata, encodes each tensor descriptor again and queries the driver about
each pointer; that takes longer than many kernels run. Here pointers are plain integers, and encoded descriptors are
cached by address, sizes, strides and encoding.

The function's arguments are not part of Triton's interface. Two forms are known, distinguished by an attribute of the
launcher: with `kernel_signature` (Triton 3.7 to 3.9), kernel arguments follow in a list; without it (3.6), one by one.
Each kernel tries the function once with an empty grid. If that fails, or while a profiler has hooked Triton's launches,
Triton's regular launch is used: see `Kernel.path`.
"""

import inspect
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from codegen.launching.recent import Recent

MAPS: Recent[Any] = Recent(8192)
"""(description, address) -> the encoded descriptor: 128 bytes, without a reference to the memory it describes."""

_ENCODINGS: dict[Hashable, int] = {}
"""Descriptor encoding of a compiled kernel -> its number in descriptions."""

_RUNTIME = triton.knobs.runtime


def hooked() -> bool:
    """Whether launch hooks are installed."""
    enter, leave = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook
    # An empty hook chain is not a hook.
    return (enter is not None and bool(getattr(enter, "calls", True))) or (
        leave is not None and bool(getattr(leave, "calls", True))
    )


def is_descriptor(argument: object) -> bool:
    """Whether an argument is a tensor descriptor, of Triton or of Gluon."""
    return hasattr(argument, "block_shape")


class Address:
    """Replaces a tensor if only its address matters."""

    __slots__ = ("_address",)

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        """The address."""
        return self._address


class Encoder:
    """Encodes the descriptors of one kernel parameter.

    Args:
        sample: A descriptor for this parameter; others differ only in address, sizes and strides.
        metadata: The compiled kernel's metadata for this parameter.
        encode: Triton's encoding function.
    """

    __slots__ = ("_encode", "_kind", "_metadata", "_number", "_state")

    def __init__(self, sample: Any, metadata: dict[str, Any], encode: Any) -> None:
        self._kind, self._metadata, self._encode = type(sample), metadata, encode
        self._state = vars(sample) | {"base": None}
        rest = {name: value for name, value in self._state.items() if name not in ("base", "shape", "strides")}
        self._number = _ENCODINGS.setdefault(repr((metadata, rest)), len(_ENCODINGS))

    def describe(self, sizes: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
        """Everything that determines the encoding of a descriptor, except its address."""
        return (self._number, *sizes, *strides)

    def __call__(self, description: tuple[int, ...], address: int) -> Any:
        """The encoded descriptor of a matrix."""
        found = MAPS.get((description, address))
        if found is None:
            rank = len(description) // 2
            sizes, strides = list(description[1 : rank + 1]), list(description[rank + 1 :])
            descriptor = _twin(self._kind, self._state, base=Address(address), shape=sizes, strides=strides)
            found = self._encode(descriptor, self._metadata)[0]
            MAPS.put((description, address), found)
        return found


class Kernel:
    """One compiled kernel, loaded on the device that was current at its first call.

    Attributes:
        compiled: Triton's handle.
        constants: The values of its last parameters, known to the compiler.
        encoders: For each argument: the encoder of a descriptor, or None for anything else.
        raw: The C function: takes grid, stream, `head`, and the arguments, one by one or, if `listed`, in a list.
        path: "direct", or "plain" for Triton's regular launch, which does not use `raw` and `encoders`.
    """

    def __init__(self, compiled: Any, arguments: Sequence[Any], constants: Sequence[Any]) -> None:
        self.compiled, self.constants = compiled, tuple(constants)
        self.encoders: list[Encoder | None] = []
        self.raw: Any = None
        self.head: tuple[Any, ...] = ()
        self.listed = False
        self.path: Literal["direct", "plain"] = "direct" if self._connect(arguments) else "plain"

    def __call__(self, programs: int, arguments: Sequence[Any]) -> None:
        """Enqueues the kernel on the current stream of the current device.

        Args:
            programs: Size of the grid.
            arguments: As `codegen.launching.launch.launch` takes them.
        """
        if self.path == "plain" or hooked():
            self.compiled[programs, 1, 1](*arguments, *self.constants)
        else:
            self.enqueue(programs, current_stream(current_device()), self.ready(arguments))

    def ready(self, arguments: Sequence[Any]) -> list[Any]:
        """The arguments of the C function: addresses, numbers, encoded descriptors with their sizes."""
        ready: list[Any] = []
        for argument, encoder in zip(arguments, self.encoders, strict=True):
            if encoder is not None:
                sizes, strides = argument.shape, argument.strides
                ready.append(encoder(encoder.describe(sizes, strides), argument.base.data_ptr()))
                ready += sizes
                ready += strides
            else:
                # Most arguments that are not tensors are integers, for which isinstance(…, Tensor) is slow.
                ready.append(argument if argument is None or argument.__class__ is int else argument.data_ptr())
        ready += self.constants
        return ready

    def enqueue(self, programs: int, stream: int, ready: list[Any]) -> None:
        """Enqueues the kernel with arguments that are `ready`; only if `path` is "direct" and no hook is installed."""
        if self.listed:
            self.raw(programs, 1, 1, stream, *self.head, ready)
        else:
            self.raw(programs, 1, 1, stream, *self.head, *ready)

    def _connect(self, arguments: Sequence[Any]) -> bool:
        """Finds the C function and tries it on an empty grid; returns whether it accepted these arguments."""
        run = self.compiled.run
        if not _needs_no_memory(run):
            return False
        function, metadata = self.compiled.function, self.compiled.packed_metadata
        self.listed = hasattr(run, "kernel_signature")
        try:
            switches = (run.launch_cooperative_grid, run.launch_pdl)
            if self.listed:
                self.head = (function, *switches, metadata, *[None] * 5, run.arg_annotations, run.kernel_signature)
            else:
                self.head = (function, *switches, None, None, metadata, None, None, None)
            self.raw = _builtin(run.launch)
            self.encoders = _encoders(arguments, self.compiled)
            self.enqueue(0, 0, self.ready(arguments))
        except (AttributeError, LookupError, TypeError, ValueError, SystemError):
            return False  # an unknown version of Triton's internals
        return True


def without_memory(arguments: Sequence[Any]) -> list[Any]:
    """The same arguments without references to tensor memory, for a kernel that has not been launched."""
    light = []
    for argument in arguments:
        if is_descriptor(argument):
            light.append(_twin(type(argument), vars(argument), base=Address(argument.base.data_ptr())))
        else:
            light.append(Address(argument.data_ptr()) if isinstance(argument, Tensor) else argument)
    return light


def _twin(kind: Any, fields: dict[str, Any], **changed: Any) -> Any:
    """An object with these fields, without the checks of its constructor."""
    twin = kind.__new__(kind)
    twin.__dict__.update(fields, **changed)
    return twin


def current_device() -> int:
    """The index of torch's current CUDA device, for a process that uses one."""
    index: int = torch._C._cuda_getDevice()
    return index


def current_stream(device: int) -> int:
    """The handle of torch's current stream on the CUDA device of that index."""
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return stream


def _needs_no_memory(run: Any) -> bool:
    """Whether launches by a launcher of Triton need no allocation and no instrumentation."""
    sizes = [getattr(run, name, None) for name in ("global_scratch_size", "profile_scratch_size")]
    return sizes == [0, 0] and not getattr(run, "gsan_enabled", False)


def _builtin(function: Any) -> Any:
    """The C function wrapped by the Python function that expands descriptors, if there is one."""
    raw = function if inspect.isbuiltin(function) else inspect.getclosurevars(function).nonlocals["launcher"]
    if not inspect.isbuiltin(raw):
        raise TypeError(f"{raw} is not a C function")
    return raw


def _encoders(arguments: Sequence[Any], compiled: Any) -> list[Encoder | None]:
    """The encoder for each argument that is a descriptor; raises TypeError if it is unknown."""
    if not any(map(is_descriptor, arguments)):
        return [None] * len(arguments)
    make = inspect.getmodule(type(compiled.run)).make_tensordesc_arg  # type: ignore[union-attr]
    extra = (None,) * (len(inspect.signature(make).parameters) - 2)
    described = list(compiled.metadata.tensordesc_meta or [])
    if len(described) != sum(map(is_descriptor, arguments)) or any(m.get("is_im2col") for m in described):
        raise TypeError("the descriptors of this kernel are not tile descriptors")

    def encode(descriptor: Any, metadata: dict[str, Any]) -> Any:
        return make(descriptor, metadata, *extra)

    waiting = iter(described)
    return [Encoder(each, next(waiting), encode) if is_descriptor(each) else None for each in arguments]
