"""Tokenizers: read from a model's folder, and kept in artefacts as text files."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcompiler.artefact.folder import Folder
from qcompiler.artefact.manifest import TOKENIZER
from qcompiler.capture.quiet import third_party_silence
from qcompiler.checkpoints.files import read_json
from qcompiler.checkpoints.loading import transformers_library
from qcompiler.errors import ArtefactError, InputError, QCompilerError

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
"""A folder with one of these has a tokenizer."""

GENERATION = "generation_config.json"


def check_tokenizer(tokenizer: Any) -> None:
    """Raises InputError if this is neither None nor an object that encodes when it is called, and decodes."""
    if tokenizer is None or (callable(tokenizer) and callable(getattr(tokenizer, "decode", None))):
        return
    fix = "Load it: transformers.AutoTokenizer.from_pretrained(folder)."
    got, need = type(tokenizer).__name__, "a tokenizer of transformers"
    raise InputError("the tokenizer is of a wrong type", got=got, need=need, fix=fix)


def tokenizer_in(folder: Path) -> Any:
    """Returns the tokenizer in a folder; None if there is none.

    Raises:
        QCompilerError: transformers cannot read it, or is not installed.
    """
    if not any((folder / name).is_file() for name in FILES):
        return None
    kind = transformers_library().AutoTokenizer
    try:
        with third_party_silence():
            return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged file may raise anything
        got = f"{type(error).__name__}: {error}"
        raise QCompilerError("the tokenizer cannot be loaded", got=got, where=str(folder)) from error


def tokenizer_texts(tokenizer: Any, generation: Mapping[str, Any]) -> dict[str, str]:
    """Returns the files that an artefact keeps of a tokenizer and a generation configuration: name -> text.

    Raises:
        ArtefactError: A file is not text: its tokenizer runs without the library `tokenizers`.
    """
    found = (
        {f"{TOKENIZER}/{GENERATION}": f"{json.dumps(dict(generation), indent=2, default=str)}\n"} if generation else {}
    )
    if tokenizer is None:
        return found
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_dir():
                continue
            try:
                found[f"{TOKENIZER}/{path.relative_to(folder).as_posix()}"] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                fix = "Make the decoder with tokenizer=None to save it without one."
                raise ArtefactError("the tokenizer cannot be saved", got=f"{path.name}: {error}", fix=fix) from error
    return found


def read_tokenizer(folder: Folder) -> tuple[Any, dict[str, Any]]:
    """Returns the tokenizer of an artefact, or None, and its generation configuration, after checking their hashes."""
    for name in folder.manifest.files:
        if name.startswith(f"{TOKENIZER}/"):
            folder.text(name)
    path = folder.path / TOKENIZER
    return tokenizer_in(path), generation_in(path)


def generation_in(folder: Path) -> dict[str, Any]:
    """Returns the entries of a folder's generation configuration; empty if it has none.

    Raises:
        QCompilerError: The file is not a JSON object.
    """
    path = folder / GENERATION
    return read_json(path) if path.is_file() else {}


def generation_of(model: Any) -> dict[str, Any]:
    """Returns the entries of a model's generation configuration that differ from transformers' defaults."""
    entries = getattr(getattr(model, "generation_config", None), "to_diff_dict", None)
    return dict(entries()) if callable(entries) else {}
