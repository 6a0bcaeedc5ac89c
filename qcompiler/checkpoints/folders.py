"""Writes a checkpoint folder atomically: to a temporary sibling that is then moved, in shards with an index.

config.json    model-00001-of-00002.safetensors    model-00002-of-00002.safetensors    model.safetensors.index.json
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from qcompiler.errors import QCompilerError
from qcompiler.files.replacing import replacing
from qcompiler.runtime.tensor_files import write_tensors

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

COMPANIONS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model",
    "*.tiktoken", "generation_config.json", "preprocessor_config.json", "processor_config.json", "LICENSE*",
)  # fmt: skip
"""Companion files of a model that are copied unchanged."""

KNOWN = (CONFIG, INDEX, "*.safetensors", *COMPANIONS)
"""Files that may be overwritten in an existing folder."""


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], documents: Mapping[str, Any], companions: Path | None, shard_bytes: int
) -> None:
    """Writes a complete checkpoint folder, or none.

    Args:
        folder: The folder to write; an existing one must be a checkpoint or empty.
        tensors: All tensors by name.
        documents: File name -> its JSON content.
        companions: A folder whose tokenizer and similar files are copied.
        shard_bytes: Maximum bytes of tensors in a file; a larger tensor gets its own file.

    Raises:
        QCompilerError: The folder holds other files, or it cannot be written.
    """
    check_place(folder)
    size = sum(tensor.nbytes for tensor in tensors.values())
    with replacing(folder, lambda error: QCompilerError("the checkpoint cannot be written", got=error), size) as made:
        for source in _companions(companions):
            shutil.copyfile(source, made / source.name)
        _write_tensors(made, tensors, shard_bytes)
        for name, document in documents.items():
            (made / name).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        check_place(folder)


def check_place(folder: Path) -> None:
    """Raises QCompilerError if the path holds anything that must not be overwritten."""
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir() or folder.is_symlink():
        raise QCompilerError("a checkpoint is a folder, but the path is not one", got=str(folder))
    strange = [path.name for path in folder.iterdir() if not path.is_file() or not _is_known(path.name)]
    if strange:
        got = f"'{sorted(strange)[0]}' in {folder}"
        fix = "Write to another folder, or empty that one yourself."
        raise QCompilerError("the folder holds files that are not part of a checkpoint", got=got, fix=fix)


def _is_known(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in KNOWN)


def _companions(folder: Path | None) -> Iterator[Path]:
    for path in sorted(folder.iterdir()) if folder is not None else ():
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in COMPANIONS):
            yield path


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    shards = _shards(tensors, shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        write_tensors(_apart({key: tensors[key] for key in shard}), folder / name, {"format": "pt"})
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors that share memory: the file then stores the data twice."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        found[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return found


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards
