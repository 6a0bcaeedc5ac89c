"""Model inputs from the command line: random tensors by type, tensors in files, lines of text.

x=bf16[4,256]               random numbers for the argument x
ids=i64[1,16] in 0..30521   random integers, both bounds included
FILE.safetensors            tensors by argument name or position: x, or 0
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from qcompiler.errors import InputError
from qcompiler.ir import DType, TensorType
from qcompiler.ir.types import LONG_NAMES
from qcompiler.numerics.dtypes import torch_dtype

SPEC = re.compile(
    r"\s*(?P<name>\w+)\s*=\s*(?P<dtype>\w+)\s*\[(?P<shape>[\d,\s]*)\](?:\s*in\s*(?P<low>-?\d+)\s*\.\.\s*(?P<high>-?\d+))?\s*"
)
NEED = 'NAME=TYPE, such as "x=bf16[4,256]", or "ids=i64[1,16] in 0..30521"'
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Call:
    """The arguments of one call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def on(self, device: "torch.device | str | None") -> "Call":
        """The call on a device; None keeps it where it is."""

        def moved(value: Any) -> Any:
            return value.to(device) if device is not None and isinstance(value, torch.Tensor) else value

        return Call(tuple(map(moved, self.args)), {name: moved(value) for name, value in self.kwargs.items()})

    def as_batch(self, where: str) -> Any:
        """The call as a calibration batch for `compile`: a tuple or a dict."""
        if self.args and self.kwargs:
            need = "all by name, or all by position"
            raise InputError(
                "a calibration batch has some arguments by name and others by position", need=need, where=where
            )
        return self.kwargs or self.args


def random_call(specs: Sequence[str]) -> Call:
    """A call with random tensors (fixed seed) for these specs. Raises InputError if a spec is malformed."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for spec in specs:
        match = SPEC.fullmatch(spec)
        if match is None:
            raise InputError("an input description is malformed", got=repr(spec), need=NEED)
        if match["name"] in tensors:
            raise InputError("an input is described twice", got=repr(match["name"]))
        kind = _type(spec, match)
        tensors[match["name"]] = random_tensor(kind, generator, _range(spec, match, kind))
    return call_of(tensors, "the inputs")


def random_tensor(kind: TensorType, generator: torch.Generator, ends: tuple[int, int] | None = None) -> torch.Tensor:
    """Normal random numbers, or integers between two inclusive bounds (default 0 and 1)."""
    dtype, shape = torch_dtype(kind.dtype), [int(size) for size in kind.shape if isinstance(size, int)]
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex64 if dtype.is_complex else torch.float32
        return torch.randn(shape, generator=generator, dtype=wide).to(dtype)
    low, high = ends or (0, 1)
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def _type(spec: str, match: re.Match[str]) -> TensorType:
    whole = [dtype for dtype in DType if dtype.bits >= 8]  # torch has no tensors with 4-bit elements
    known = {str(dtype): dtype for dtype in whole} | LONG_NAMES
    if match["dtype"] not in known:
        need = ", ".join(map(str, whole))
        raise InputError(
            "an input description has an unknown element type", got=repr(match["dtype"]), need=need, where=spec
        )
    sizes = [size for part in match["shape"].split(",") if (size := part.strip())]
    return TensorType(known[match["dtype"]], tuple(map(int, sizes)))


def _range(spec: str, match: re.Match[str], kind: TensorType) -> tuple[int, int] | None:
    if match["low"] is None:
        return None
    low, high = int(match["low"]), int(match["high"])
    if low > high or kind.dtype.is_float or kind.dtype in (DType.c64, DType.c128):
        need = "an integer type, and a first bound that is at most the second"
        raise InputError("an input description has an invalid range", got=repr(spec), need=need)
    return low, high


# Files


def calls_in(path: str) -> list[Call]:
    """The calls in a .safetensors file: one, with tensors by argument, or several as `0.name`, `1.name`, ….

    Raises:
        InputError: The file cannot be read, or mixes the two forms.
    """
    tensors = _load(path)
    numbered = [name for name in tensors if "." in name]
    if not numbered:
        return [call_of(tensors, path)]
    calls: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        number, dot, argument = name.partition(".")
        if not dot or not number.isdecimal() or not argument:
            need = "only argument names, for one call; or only number.argument, for several"
            raise InputError("tensor names in the file mix two forms", got=repr(name), need=need, where=path)
        calls.setdefault(int(number), {})[argument] = tensor
    return [call_of(calls[number], f"call {number} in {path}") for number in sorted(calls)]


def example_in(path: str) -> Call:
    """The only call in a file. Raises InputError if there are more."""
    calls = calls_in(path)
    if len(calls) != 1:
        raise InputError("the example has several calls", got=f"{len(calls)} in {path}", need="one")
    return calls[0]


def call_of(tensors: Mapping[str, torch.Tensor], where: str) -> Call:
    """A call with tensors by name or position. Raises InputError if a position is missing."""
    places = sorted(int(name) for name in tensors if name.isdecimal())
    if places != list(range(len(places))):
        raise InputError("a position is missing", got=places, need=list(range(len(places))), where=where)
    named = {name: tensor for name, tensor in tensors.items() if not name.isdecimal()}
    return Call(tuple(tensors[str(place)] for place in places), named)


def _load(path: str) -> dict[str, torch.Tensor]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError("tensors cannot be read", got=f"{path}: {error}", need="a .safetensors file") from error
    if not tensors:
        raise InputError("the file has no tensors", got=path)
    return tensors


def lines_of(path: str) -> list[str]:
    """The nonempty lines of a text file. Raises InputError if there are none."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("the calibration text cannot be read", got=f"{path}: {error}", need="a text file") from error
    if not lines:
        raise InputError("the calibration text is empty", got=path, need="one sample per line")
    return lines
