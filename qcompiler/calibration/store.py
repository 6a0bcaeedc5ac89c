"""Stores statistics in one safetensors file: numbers as tensors, the rest as JSON in the file's metadata.

    <index of the value>.absmax, <index>.histogram.channel, …       metadata: {"qcompiler.calibration": JSON}

The JSON contains the format version, the names and modules of the values, and a digest of everything.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qcompiler.calibration.histogram import BIAS, CHANNEL_BITS, EXPONENTS, LOWEST, TENSOR_BITS, Histogram, bin_count
from qcompiler.calibration.sample import Sample
from qcompiler.calibration.statistics import Statistics
from qcompiler.errors import InputError
from qcompiler.files.replacing import not_replaced, replacing_file
from qcompiler.runtime.tensor_files import write_tensors

VERSION = 1
"""The format version; a file with a larger version comes from a newer qcompiler."""

KEY = "qcompiler.calibration"
RANGES = ("absmax", "minimum", "maximum", "average", "first")
NUMBERS = ("channels", "rows", "batches", "filled", "nan", "inf", "nonfinite_batch")


@dataclass(frozen=True)
class Observed:
    """Statistics of one value with its module.

    Attributes:
        statistics: Its statistics.
        module: Its module path in the model.
    """

    statistics: Statistics
    module: str


def write(path: str | os.PathLike[str], values: Mapping[str, Observed]) -> None:
    """Writes a file atomically; InputError on failure."""
    target = Path(path)
    try:
        with replacing_file(target) as partial:
            write_file(partial, values)
    except OSError as error:
        need = "the path of a file, in a folder that can be written"
        said = InputError("the calibration cannot be saved", got=f"{target}: {error}", need=need)
        raise not_replaced(said, error, target, sum(each.nbytes for each in _tensors(values).values())) from error


def write_file(path: Path, values: Mapping[str, Observed]) -> None:
    """Writes a new file; OSError on failure."""
    tensors = {key: tensor.contiguous() for key, tensor in _tensors(values).items()}
    write_tensors(tensors, path, {KEY: json.dumps({**_head(values), "digest": digest(values)})})


def read(path: str | os.PathLike[str]) -> dict[str, Observed]:
    """Reads a file that `write` wrote; InputError names a file that is missing, damaged, unknown or newer."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()} if text else {}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError) as error:
        raise InputError("the calibration file cannot be read", got=f"{path}: {error}") from error
    if text is None:
        need = "a file written by Calibration.save"
        raise InputError("this is not a calibration file", got=path, need=need)
    try:
        head = json.loads(text)
        if head["version"] > VERSION:
            raise _Newer(head["version"])
        values = _restored(head, tensors)
        if digest(values) != head["digest"]:
            raise ValueError("its contents do not match its digest")
    except _Newer as newer:
        fix = "Read it with the version of qcompiler that wrote it, or a newer one."
        raise InputError(
            "the calibration file is newer than this qcompiler",
            got=f"{path}, version {newer}",
            need=f"version {VERSION}",
            fix=fix,
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        fix = "Calibrate again."
        raise InputError("the calibration file is damaged", got=f"{path}: {error}", fix=fix) from error
    return values


def digest(values: Mapping[str, Observed]) -> str:
    """Returns the SHA-256 of names, numbers and tensors, in hex; independent of the observation order."""
    ordered = dict(sorted(values.items()))
    hashed = hashlib.sha256(json.dumps(_head(ordered), sort_keys=True).encode())
    for key, tensor in sorted(_tensors(ordered).items()):
        hashed.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
        hashed.update(tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()


class _Newer(Exception):
    """The version of the file is unknown to this qcompiler."""


def _head(values: Mapping[str, Observed]) -> dict[str, Any]:
    listed = [
        {
            "name": name,
            "module": value.module,
            **{key: getattr(value.statistics, key) for key in NUMBERS},
            "histogram": value.statistics.histogram and _bins(value.statistics.histogram.low),
            "capacity": value.statistics.sample.capacity if value.statistics.sample is not None else None,
        }
        for name, value in values.items()
    ]
    return {"version": VERSION, "values": listed}


def _bins(low: int | None) -> list[int]:
    """Returns the exponents that have their own bins, and the mantissa bits of bins."""
    low = LOWEST if low is None else low
    return [low, low + EXPONENTS, TENSOR_BITS, CHANNEL_BITS]


def _low_of(bins: Any) -> int:
    """The inverse of `_bins`; ValueError for any other bins."""
    for low in range(1 - BIAS, BIAS + 2 - EXPONENTS):
        if bins == _bins(low):
            return low
    raise ValueError(f"its histograms have bins {bins}, expected bins such as {_bins(LOWEST)}")


def _tensors(values: Mapping[str, Observed]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for index, value in enumerate(values.values()):
        seen = value.statistics
        found |= {f"{index}.{key}": getattr(seen, key) for key in RANGES}
        if seen.histogram is not None:
            found[f"{index}.histogram.tensor"] = seen.histogram.tensor
            found[f"{index}.histogram.channel"] = seen.histogram.channel
        if seen.sample is not None:
            found[f"{index}.sample.rows"], found[f"{index}.sample.keys"] = seen.sample.rows, seen.sample.keys
    return found


def _restored(head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Observed]:
    values = {}
    for index, entry in enumerate(head["values"]):
        fields: dict[str, Any] = {key: entry[key] for key in NUMBERS}
        fields |= {key: _expected(tensors, f"{index}.{key}", entry["channels"]) for key in RANGES}
        statistics = Statistics(**fields)
        if entry["histogram"] is not None:
            low = _low_of(entry["histogram"])
            fine, coarse = bin_count(TENSOR_BITS), bin_count(CHANNEL_BITS)
            tensor = _expected(tensors, f"{index}.histogram.tensor", fine, dtype=torch.int64)
            channel = _expected(tensors, f"{index}.histogram.channel", entry["channels"], coarse, dtype=torch.int32)
            statistics.histogram = Histogram(tensor, channel, low if tensor[1:].any() else None)
        if entry["capacity"] is not None:
            keys = tensors[f"{index}.sample.keys"]
            rows = _expected(tensors, f"{index}.sample.rows", keys.numel(), entry["channels"])
            statistics.sample = Sample(entry["capacity"], rows, keys)
        values[entry["name"]] = Observed(statistics, entry["module"])
    return values


def _expected(tensors: Mapping[str, Tensor], key: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    tensor = tensors[key]
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(f"{key} is {tensor.dtype}{list(tensor.shape)}, not {dtype}{list(shape)}")
    return tensor
