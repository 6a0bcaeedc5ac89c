"""Hugging Face folders: config.json, .safetensors and a tokenizer, read only from disk.

transformers is optional, and imported only here, when such a folder is named.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qcompiler.capture.quiet import third_party_silence
from qcompiler.checkpoints import Checkpoint, read
from qcompiler.checkpoints.loading import transformers_library
from qcompiler.cli.inputs import Call, lines_of
from qcompiler.compiler.sharded_loading import loaded
from qcompiler.errors import InputError, QCompilerError

SENTENCES = ("A short sentence.", "Another one, which is longer than the first, so that one of them is padded.")
"""Default example text for capture, if there is a tokenizer."""

LONGEST = 512


def load_folder(folder: Path, checkpoint: Checkpoint | None = None, mesh: Any = None) -> Any:
    """Loads the model in a folder, quantized or not, with the class named in config.json; on a mesh, to be read later.

    Raises:
        QCompilerError: The folder is not a checkpoint, or is broken; or transformers is missing, or does not know it.
    """
    with no_bars():
        return _guarded("the model", folder, lambda: loaded(checkpoint or read(folder), mesh))


def example_for(model: Any, folder: Path) -> Call | None:
    """Arguments of one call: two tokenized sentences, or else the model's own dummy inputs."""
    if getattr(model, "main_input_name", None) != "input_ids":
        return None
    tokenizer = tokenizer_in(folder)
    if tokenizer is None:
        return Call(kwargs={"input_ids": model.dummy_inputs["input_ids"]})
    pads = tokenizer.pad_token is not None
    return _tokenized(tokenizer, SENTENCES if pads else SENTENCES[:1] * 2, LONGEST)


def text_calls(folder: Path | None, path: str, batch_size: int, max_length: int) -> Iterator[Call]:
    """Batches of lines of a text file as calls of the model in `folder`. Raises InputError without a tokenizer.

    If the tokenizer has no padding token, each line is a separate call.
    """
    tokenizer = None if folder is None else tokenizer_in(folder)
    if tokenizer is None:
        need = "a Hugging Face folder with a tokenizer, or calibration data in .safetensors files"
        raise InputError("calibration text needs a tokenizer", got=path, need=need)
    lines, size = lines_of(path), 1 if tokenizer.pad_token is None else batch_size
    for at in range(0, len(lines), size):
        yield _tokenized(tokenizer, lines[at : at + size], max_length)


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer in a folder; None if there is none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        return None
    kind = transformers_library().AutoTokenizer
    with third_party_silence():
        return _guarded("the tokenizer", folder, lambda: kind.from_pretrained(folder, local_files_only=True))


def _tokenized(tokenizer: Any, texts: Sequence[str], max_length: int) -> Call:
    """Tokenized arguments for texts, padded to the same length."""
    padding = len(texts) > 1 and len(set(texts)) > 1
    made = tokenizer([*texts], padding=padding, truncation=True, max_length=max_length, return_tensors="pt")
    return Call(kwargs=dict(made))


def _guarded(what: str, folder: Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except QCompilerError:
        raise
    except Exception as error:  # a damaged folder may raise anything
        got = f"{type(error).__name__}: {error}"
        raise InputError(f"{what} cannot be loaded", got=got, where=str(folder)) from error


@contextmanager
def no_bars() -> Iterator[None]:
    """Hides transformers' progress bars: progress is shown already, or not wanted."""
    logging = transformers_library().utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
