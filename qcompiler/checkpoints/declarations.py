"""The places where a checkpoint may declare that it is quantized.

config.json: {"quantization_config": {...}}                      read; also inside `text_config` and similar
config.json: {"compression_config": {...}}                       read: the older key for the same content
hf_quant_config.json: {"quantization": {...}}                    read in `modelopt`
config.json: {"quantize": "w8a8", ...}, and other files          not read; named if the tensors do not fit
config.json: {"transform_config": {...}}                         rejected: the weights are stored transformed
"""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qcompiler.errors import QCompilerError

KEYS = ("quantization_config", "compression_config")
FILES = (".json", ".yaml", ".yml")

TRANSFORMS = re.compile(r"^transform_config$|hadamard|quarot|spinquant|(?:^|_)rotations?(?:$|_(?:config|args|type))")
"""Keys that change the meaning of weights without a trace in the tensors."""


def declared(config: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """The quantization configuration in `config.json`; None if nothing is quantized.

    Args:
        config: The content of the file.
        where: The path of the file, for messages.

    Raises:
        QCompilerError: A configuration is not an object, two of them differ, or weights are stored transformed.
    """
    found: dict[str, Any] = {}
    for path, value in _entries(config):
        key = path.rpartition(".")[2]
        if key in KEYS:
            found[path] = value
        elif TRANSFORMS.search(key.lower()) and value:
            fix = "The weights belong to transformed activations. Undo the transform, or compile the original model."
            raise QCompilerError(
                "weights that are stored transformed are not supported", got=f"the key '{path}'", where=where, fix=fix
            )
    for path, said in found.items():
        if not isinstance(said, dict):
            raise QCompilerError(f"'{path}' is not a JSON object", got=type(said).__name__, where=where)
        if said != next(iter(found.values())):
            fix = "Remove the wrong one."
            raise QCompilerError("two quantization configurations differ", got=", ".join(found), where=where, fix=fix)
    return next(iter(found.values()), None)


def unread(folder: Path, config: Mapping[str, Any], read: Collection[str] = ()) -> str | None:
    """A sentence that lists keys and files that declare a quantization but are not read; None if there are none.

    Args:
        folder: The checkpoint.
        config: The content of its `config.json`.
        read: Names of other files that are read.
    """
    keys = [path for path, value in _entries(config) if isinstance(value, str | dict) and _is_foreign(path)]
    files = [path.name for path in sorted(folder.glob("*")) if path.suffix in FILES and "quant" in path.name.lower()]
    files = [name for name in files if name not in read]
    found = [*(f"the key '{path}' in config.json" for path in keys), *files]
    return f"The folder declares a quantization that is not read: {', '.join(found)}." if found else None


def undeclare(config: Any) -> None:
    """Removes quantization configurations and 8-bit compute dtypes from a transformers configuration."""
    waiting, seen = [config], set[int]()
    while waiting:
        part = waiting.pop()
        seen.add(id(part))
        entries = part if isinstance(part, dict) else vars(part)
        for key in KEYS:
            entries.pop(key, None)
        if isinstance(dtype := getattr(part, "dtype", None), torch.dtype) and dtype.itemsize == 1:
            part.dtype = None  # some folders store the type of their codes here
        inner = [value for value in entries.values() if isinstance(value, dict) or hasattr(value, "to_json_string")]
        waiting += [value for value in inner if id(value) not in seen]


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted key -> value of all non-empty entries; does not descend into `KEYS`."""
    waiting: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    while waiting:
        prefix, entries = waiting.pop()
        for key, value in entries.items():
            if value is None or value == {}:
                continue
            yield prefix + key, value
            if isinstance(value, dict) and key not in KEYS:
                waiting.append((f"{prefix}{key}.", value))


def _is_foreign(path: str) -> bool:
    key = path.rpartition(".")[2]
    return "quant" in key.lower() and key not in KEYS
