"""Where a checkpoint says that it is quantized, beside the one place that most have.

config.json: {"quantization_config": {...}}                      read; also inside of `text_config` and the like
config.json: {"compression_config": {...}}                       read: the older key for the same content
hf_quant_config.json: {"quantization": {...}}                    read in `modelopt`
config.json: {"quantize": "w8a8", ...}, and other files          not read, and named when the tensors do not fit
config.json: {"transform_config": {...}}                         refused: the weights are not what they look like
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
"""Keys whose value changes what weights mean though no tensor tells."""


def declared(config: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """The quantization configuration in a `config.json`; None if nothing is quantized.

    Args:
        config: The content of the file.
        where: Its path, for messages.

    Raises:
        QCompilerError: The configuration is not an object, two of them differ, or weights are stored transformed.
    """
    found: dict[str, Any] = {}
    for path, value in _entries(config):
        key = path.rpartition(".")[2]
        if key in KEYS:
            found[path] = value
        elif TRANSFORMS.search(key.lower()) and value:
            fix = "The weights belong to transformed activations. Undo the transform, or compile the original model."
            raise QCompilerError("weights that are stored transformed are not supported", got=f"the key '{path}'",
                                 where=where, fix=fix)  # fmt: skip
    for path, said in found.items():
        if not isinstance(said, dict):
            raise QCompilerError(f"'{path}' is not a JSON object", got=type(said).__name__, where=where)
        if said != next(iter(found.values())):
            fix = "Remove the wrong one."
            raise QCompilerError("two quantization configurations differ", got=", ".join(found), where=where, fix=fix)
    return next(iter(found.values()), None)


def unread(folder: Path, config: Mapping[str, Any], read: Collection[str] = ()) -> str | None:
    """A sentence that names the keys and files that declare a quantization and are not read; None if there are none.

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
    """Removes quantization configurations from a configuration of transformers, and 8-bit types to compute in."""
    waiting, seen = [config], set[int]()
    while waiting:
        part = waiting.pop()
        seen.add(id(part))
        entries = part if isinstance(part, dict) else vars(part)
        for key in KEYS:
            entries.pop(key, None)
        if isinstance(dtype := getattr(part, "dtype", None), torch.dtype) and dtype.itemsize == 1:
            part.dtype = None  # some folders give the type of their codes here
        inner = [value for value in entries.values() if isinstance(value, dict) or hasattr(value, "to_json_string")]
        waiting += [value for value in inner if id(value) not in seen]


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted key -> value of all entries that are not empty; what is inside of `KEYS` is left to their readers."""
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
