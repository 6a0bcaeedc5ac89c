"""Identifies a path that is not the expected checkpoint or artefact, and tells the user what to do with it.

    folder/manifest.json                      an artefact            qcompiler.load(folder)
    folder/config.json, *.safetensors         a checkpoint           qcompiler.compile(folder)
    folder/model.gguf, .onnx, .bin            other weights          how to convert them
    meta-llama/Llama-3-8B, does not exist     a name on the Hub      download it first

Only file names and the `format` field of a manifest are read.
"""

import errno
import json
import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from qcompiler.errors import QCompilerError
from qcompiler.program.exporters import MANIFEST, exported_at

ARTEFACT = "qcompiler artefact"  # the format in the manifest of an artefact
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
LONGEST = 200  # maximum characters of a path in a message

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

PICKLED = (
    "Pickled weights are never read. If you trust them, convert them with transformers: "
    "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other_folder)."
)
FOREIGN = {
    ".gguf": "GGUF weights are not read. Convert them with transformers: "
    "AutoModelForCausalLM.from_pretrained(folder, gguf_file=name).save_pretrained(other_folder).",
    ".onnx": "ONNX models are not read. Compile the PyTorch model that was exported.",
    ".pt2": "Load an exported program with torch.export.load(file) and compile the result.",
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), PICKLED),
    **dict.fromkeys((".h5", ".msgpack"), "TensorFlow and Flax weights are not read. Convert them to safetensors."),
}
"""Suffix of a weights file -> what to do with it."""


def checked_path(path: object, error: type[QCompilerError] = QCompilerError) -> Path:
    """Returns a folder path, which may not exist.

    Args:
        path: The user's argument.
        error: The class of error to raise.

    Raises:
        QCompilerError: It is not a path, its name is invalid on this system, or the user has no permission to read it.
    """
    try:
        found = Path(path)  # type: ignore[arg-type]
        if stat.S_ISDIR(os.stat(found).st_mode) and not os.access(found, os.R_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as reason:
        raise error("the folder cannot be read", got=reason.strerror, where=_short(str(path))) from reason
    except (TypeError, ValueError) as reason:
        got = _short(repr(path)) if isinstance(path, str | bytes | os.PathLike) else type(path).__name__
        raise error("this is not a path", got=got, need="the path of a folder") from reason
    return found


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def advice(path: Path) -> str | None:
    """Describes a path and what to do with it; None if nothing helpful is known.

    Args:
        path: The user's argument: a relative path that does not exist may be a name on the Hub.
    """
    with suppress(OSError):
        if path.is_dir():
            return _of_folder(path)
        if path.is_file():
            return _of_file(path)
        if HUB_NAME.fullmatch(str(path)) and path.suffix not in (*FOREIGN, ".safetensors"):
            fix = f"huggingface_hub.snapshot_download({str(path)!r})"
            return f"If this is a model on the Hugging Face Hub: nothing is downloaded. Call {fix} and give its folder."
    return None


def _of_file(path: Path) -> str:
    if path.suffix in FOREIGN:
        return FOREIGN[path.suffix]
    if path.suffix in (".safetensors", ".json"):
        return f"This is a file. Pass the folder that contains it: {path.parent}."
    return "This is a file, but a folder is needed."


def _of_folder(path: Path) -> str | None:
    files = sorted(file.name for file in path.iterdir() if file.is_file())
    if MANIFEST in files and _format(path / MANIFEST) == ARTEFACT:
        return "The folder is a qcompiler artefact: load it with qcompiler.load(folder)."
    if (written := exported_at(path)) is not None:
        return f"This is {written[1].kind}: load it with {written[1].runs}(folder)."
    tensors = [name for name in files if name.endswith(".safetensors")]
    if "adapter_config.json" in files and {*tensors} <= {"adapter_model.safetensors"}:
        return "The folder contains an adapter. Merge it into its base model with peft, save that, and pass its folder."
    if tensors and CONFIG in files:
        if INDEX in files or "model.safetensors" in tensors:
            return "The folder is a Hugging Face checkpoint: compile it with qcompiler.compile(folder)."
        return f"Its safetensors files have other names: {', '.join(tensors[:3])}."
    for suffix, what in FOREIGN.items():
        if found := [name for name in files if Path(name).suffix == suffix]:
            return f"The folder has {found[0]}. {what}"
    return _of_contents(path, files)


def _of_contents(path: Path, files: list[str]) -> str | None:
    """Advice for a folder without weights."""
    inner = sorted({file.parent for pattern in ("*", "snapshots/*") for file in path.glob(f"{pattern}/{CONFIG}")})
    if inner:
        return f"A subfolder may be meant: {inner[0]}."
    if not files:
        return "The folder has no files." if any(path.iterdir()) else "The folder is empty."
    return f"The folder has a {CONFIG} and no weights: download them too." if CONFIG in files else None


def is_artefact(folder: Path) -> bool:
    """Whether a folder has the manifest of an artefact."""
    return _format(folder / MANIFEST) == ARTEFACT


def _format(manifest: Path) -> object:
    """Returns the `format` field of a manifest; None if the file is not a manifest."""
    try:
        document = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return document.get("format") if isinstance(document, dict) else None
