"""Writes tensors to a safetensors file and raises ordinary OS errors."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file.

    Args:
        tensors: By name; contiguous, and without shared memory.
        path: The file, which is replaced if it exists.
        metadata: Entries for the header of the file.

    Raises:
        OSError: The disk is full, the folder does not exist, or similar. safetensors raises its own error class, with
            the OS error number only in its text.
    """
    try:
        save_file({**tensors}, path, None if metadata is None else {**metadata})
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
