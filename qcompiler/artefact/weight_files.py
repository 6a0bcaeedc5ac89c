"""Weights in safetensors files: written one tensor at a time, and memory-mapped when first used.

The safetensors library can read the files: header length, JSON header, tensors without gaps. We write them ourselves to
avoid a second copy of the weights in memory, and to align tensors to 64 bytes where their size allows it: results of
matmuls may depend on alignment in their last bits.

A tensor with several names is stored once, in its memory order: a transposed tensor has permuted axes in the file and
is loaded transposed.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qcompiler.artefact.strict_json import AGAIN
from qcompiler.errors import ArtefactError
from qcompiler.ir import TensorType
from qcompiler.numerics.dtypes import IR_DTYPES

ALIGNMENT = 64
"""Alignment in bytes, the same as in torch's allocator."""

SHARD_BYTES = 4_000_000_000
"""Bytes of tensors in one file."""

FORMATS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in FORMATS.items()}

SINGLE = "weights.safetensors"
CHUNK = 16 << 20


def shard_name(number: int, count: int) -> str:
    """The name of file `number` of `count`."""
    return SINGLE if count == 1 else f"weights-{number:05d}-of-{count:05d}.safetensors"


@dataclass(frozen=True)
class Plan:
    """The assignment of tensors to files.

    Attributes:
        shards: The tensors of each file by their stored names.
        aliases: Other name of a stored tensor -> its stored name.
        layouts: Stored name -> order of the axes in the file, if it differs from the tensor's.
    """

    shards: list[dict[str, Tensor]]
    aliases: dict[str, str]
    layouts: dict[str, list[int]]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for shard in self.shards for tensor in shard.values())


def plan_shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> Plan:
    """Assigns tensors to files. Raises ArtefactError for a tensor that cannot be stored."""
    stored: dict[tuple[Any, ...], str] = {}
    plan = Plan([{}], {}, {})
    size = 0
    for name, tensor in tensors.items():
        _check(name, tensor)
        first = stored.setdefault(_identity(tensor), name)
        if first != name:
            plan.aliases[name] = first
            continue
        if size and size + tensor.nbytes > shard_bytes:
            plan.shards.append({})
            size = 0
        size += tensor.nbytes
        plan.shards[-1][name] = tensor
        if (order := _order(tensor)) != sorted(order):
            plan.layouts[name] = order
    return plan


def _check(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FORMATS:
        raise ArtefactError(
            "safetensors does not have the element type of a weight",
            got=tensor.dtype,
            need=", ".join(FORMATS.values()),
            where=name,
        )
    if tensor.is_meta or type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise ArtefactError(
            "a weight has no data that can be saved",
            got=f"{type(tensor).__name__} on {tensor.device}",
            need="a plain tensor with data",
            where=name,
        )
    if name == "__metadata__":
        raise ArtefactError("safetensors reserves this name", got=name, need="another name of the weight")


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Key that is equal for views of the same data; empty tensors have no memory."""
    if not tensor.numel():
        return (id(tensor),)
    signs = tensor.is_conj(), tensor.is_neg()
    return (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride(), signs)


def _order(tensor: Tensor) -> list[int]:
    """The axes from the outermost in memory to the innermost."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda axis: (-strides[axis], axis))


# Writing


@dataclass(frozen=True)
class Written:
    """Size in bytes and SHA-256 (hex) of a written file."""

    size: int
    sha256: str


def write_shard(path: Path, tensors: Mapping[str, Tensor], save: str | None = None) -> Written:
    """Writes one file, with the name of a save in its header if there is one. Raises OSError on failure."""
    ordered = sorted(tensors.items(), key=lambda item: (item[1].nbytes % ALIGNMENT != 0, -item[1].element_size()))
    header: dict[str, Any] = {} if save is None else {"__metadata__": {"save": save}}
    offset = 0
    for name, tensor in ordered:
        shape = [tensor.shape[axis] for axis in _order(tensor)]
        header[name] = {
            "dtype": FORMATS[tensor.dtype],
            "shape": shape,
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    with path.open("wb") as file:
        writer = Hashing(file)
        writer.write(len(text).to_bytes(8, "little"))
        writer.write(text)
        for _, tensor in ordered:
            for part in _bytes_of(tensor):
                writer.write(part)
    return writer.written


class Hashing:
    """Hashes a file while writing it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.hash = file, 0, hashlib.sha256()

    def write(self, data: "bytes | memoryview") -> None:
        """Appends to the file."""
        self.file.write(data)
        self.hash.update(data)
        self.size += len(data)

    @property
    def written(self) -> Written:
        """Size and hash so far."""
        return Written(self.size, self.hash.hexdigest())


def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    """The elements in memory order, without gaps; copied in chunks from other devices."""
    flat = tensor.detach().permute(_order(tensor)).resolve_conj().resolve_neg().reshape(-1)
    for piece in flat.split(CHUNK):
        yield memoryview(piece.contiguous().cpu().view(torch.uint8).numpy())


# Reading


@dataclass
class WeightFiles:
    """The open weight files of an artefact; tensors are read on demand.

    Attributes:
        found: Stored name -> its type and file.
        aliases: As in `Plan`.
        layouts: As in `Plan`.
    """

    aliases: dict[str, str]
    layouts: dict[str, list[int]]
    found: dict[str, "tuple[TensorType, Path, Any]"] = field(default_factory=dict)

    def loaders(self, names: Iterable[str], device: torch.device) -> "dict[str, Callable[[], Tensor]]":
        """A function per name that returns its tensor; names of one tensor share a function."""
        read = cache(partial(self._read, device=device))
        return {name: partial(read, self.aliases.get(name, name)) for name in names}

    def type_of(self, name: str) -> TensorType | None:
        """The type of a weight in the model; None if there is no such weight."""
        stored = self.aliases.get(name, name)
        if stored not in self.found:
            return None
        kind, order = self.found[stored][0], self.layouts.get(stored)
        if order is None:
            return kind
        return TensorType(kind.dtype, tuple(kind.shape[place] for place in _inverse(order)))

    def ties(self) -> dict[str, tuple[str, ...]]:
        """Name -> all names of the same tensor, for tensors with several names."""
        groups: dict[str, list[str]] = {}
        for name, stored in self.aliases.items():
            groups.setdefault(stored, [stored]).append(name)
        return {name: tuple(group) for group in groups.values() for name in group}

    def _read(self, stored: str, device: torch.device) -> Tensor:
        _, path, file = self.found[stored]
        try:
            tensor: Tensor = file.get_tensor(stored)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ArtefactError("a weight cannot be read", got=error, where=f"{path}, {stored}") from error
        if device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor = tensor.clone()  # a small tensor, or a file from another writer
        order = self.layouts.get(stored)
        return tensor.to(device) if order is None else tensor.to(device).permute(_inverse(order))


def open_weights(
    paths: Iterable[Path], aliases: Mapping[str, str], layouts: Mapping[str, list[int]], manifest: Path,
    save: str | None = None,
) -> WeightFiles:  # fmt: skip
    """Opens the files and reads their headers.

    Args:
        paths: The files.
        aliases: As in `Plan`.
        layouts: As in `Plan`.
        manifest: The manifest, for messages.
        save: The name of the save that all files must have in their headers, if there is one.

    Raises:
        ArtefactError: A file is damaged, contradicts the others, or is from another save.
    """
    files = WeightFiles(dict(aliases), dict(layouts))
    for path in paths:
        _check_save(path, save)
        for name, kind, handle in _header(path):
            if name in files.found:
                raise ArtefactError("a weight is stored twice", got=name, where=str(path), fix=AGAIN)
            files.found[name] = (kind, path, handle)
    for name, stored in aliases.items():
        if stored not in files.found or name in files.found:
            raise ArtefactError(
                "an alias of a weight is wrong",
                got=f"{name} for {stored}",
                need="another name of a stored weight",
                where=str(manifest),
                fix=AGAIN,
            )
    for name, order in layouts.items():
        rank = len(files.found[name][0].shape) if name in files.found else -1
        if sorted(order) != list(range(rank)):
            raise ArtefactError(
                "the layout of a weight is wrong",
                got=f"{name}: {order}",
                need="an order of the axes of a weight",
                where=str(manifest),
                fix=AGAIN,
            )
    return files


def _check_save(path: Path, save: str | None) -> None:
    """Raises ArtefactError if a file is from another save: equal sizes do not show that."""
    try:
        opened: Any = safe_open(path, framework="pt")
        found = (opened.metadata() or {}).get("save")
    except (OSError, SafetensorError) as error:
        raise ArtefactError("a file of weights is damaged", got=error, where=str(path), fix=AGAIN) from error
    if save is not None and found != save:
        raise ArtefactError("a file of weights is from another save", got=found, need=save, where=str(path), fix=AGAIN)


def _header(path: Path) -> Iterator[tuple[str, TensorType, Any]]:
    """Name, type and handle of each tensor in a file."""
    try:
        handle: Any = safe_open(path, framework="pt")
        for name in handle.keys():  # noqa: SIM118  (it is not a mapping)
            view = handle.get_slice(name)
            if view.get_dtype() not in DTYPES:
                raise ArtefactError("a weight is of an unknown element type", got=view.get_dtype(), where=str(path))
            yield name, TensorType(IR_DTYPES[DTYPES[view.get_dtype()]], tuple(view.get_shape())), handle
    except (OSError, SafetensorError) as error:
        raise ArtefactError("a file of weights is damaged", got=error, where=str(path), fix=AGAIN) from error


def hash_file(path: Path) -> Written:
    """Size and hash of a file."""
    hashed, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            hashed.update(chunk)
            size += len(chunk)
    return Written(size, hashed.hexdigest())


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
