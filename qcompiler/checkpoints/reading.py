"""Reads a checkpoint's folder: its configuration, its tensors, and which of them are quantized, in one vocabulary.

Pure reading: nothing of the folder is run, no model is made, and each thing that does not fit is an error that names
the file and the tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.capture.stored_weights import widened
from qcompiler.checkpoints import block_fp8, compressed_groups, compressed_tensors
from qcompiler.checkpoints.files import TensorFiles, read_json
from qcompiler.checkpoints.folders import CONFIG
from qcompiler.checkpoints.quantized_weight import SCALE_DTYPES, QuantizedWeight, StoredAs
from qcompiler.errors import QCompilerError, did_you_mean

READERS = {block_fp8.METHOD: block_fp8.stored_weights, compressed_tensors.METHOD: compressed_groups.stored_weights}
"""`quant_method` -> what finds the quantized weights of a folder."""

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Checkpoint:
    """A folder that has been read.

    Attributes:
        folder: Where it is.
        config: What `config.json` says.
        tensors: All tensors, under their names in the files; each is read when it is asked for.
        stored: The quantized weights: where their scales are, and what for.
        method: The `quant_method`; None where nothing is quantized.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: TensorFiles
    stored: Mapping[str, StoredAs]
    method: str | None

    def quantized(self, name: str) -> QuantizedWeight:
        """One quantized weight, as codes and scales."""
        how, codes = self.stored[name], self.tensors[name]
        return QuantizedWeight(codes, self.scale(name), how.block)

    def scale(self, name: str) -> Tensor:
        """The scales of a quantized weight, in FP32 and in the shape of `numerics.scale_shape`."""
        how = self.stored[name]
        return widened(self.tensors[how.scale], numerics.scale_shape(self.tensors.shape(name), how.block))


def read(folder: "str | PathLike[str]") -> Checkpoint:
    """A checkpoint in safetensors, quantized or not.

    Raises:
        QCompilerError: A file is missing or broken; the quantization is of a kind that is not known; a quantized weight
            has no scale, or one that does not fit.
    """
    path = Path(folder)
    tensors = TensorFiles(path)
    config = read_json(path / CONFIG)
    stored = _stored(config, tensors, str(path / CONFIG))
    for name, how in stored.items():
        _check(name, how, tensors)
    for name in tensors:
        if name not in stored and tensors.dtype(name) in FP8:
            raise _without_scale(name, tensors)
    said = config.get("quantization_config")
    return Checkpoint(path, config, tensors, stored, said["quant_method"] if said is not None else None)


def _stored(config: Mapping[str, Any], tensors: TensorFiles, where: str) -> Mapping[str, StoredAs]:
    said = config.get("quantization_config")
    if said is None:
        return {}
    if not isinstance(said, dict):
        raise QCompilerError("'quantization_config' is no JSON object", got=type(said).__name__, where=where)
    method = said.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        raise QCompilerError("an unknown kind of quantization", got=f"quant_method {method!r}", where=where,
                             fix=did_you_mean(str(method), READERS))  # fmt: skip
    try:
        return READERS[method](said, tensors)
    except QCompilerError as error:
        error.where = f"{where}, {error.where}" if error.where else where
        raise


def _check(name: str, how: StoredAs, tensors: TensorFiles) -> None:
    """Holds a scale to its type and its shape."""
    where = f"{tensors.folder}: {how.scale}"
    if how.scale not in tensors:
        raise _without_scale(name, tensors, how.scale)
    if tensors.dtype(how.scale) not in SCALE_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in SCALE_DTYPES)
        raise QCompilerError("a scale has a wrong element type", got=tensors.dtype(how.scale), need=known, where=where)
    shape, got = tensors.shape(name), list(tensors.shape(how.scale))
    if len(shape) != 2:
        raise QCompilerError(f"the quantized weight '{name}' is no matrix", got=list(shape), where=str(tensors.folder))
    need = numerics.scale_shape(shape, how.block)
    alike = [need, *([need[:1]] if need[1] == 1 else []), *([[]] if need == [1, 1] else [])]
    if got not in alike:
        problem = f"the scale does not fit its weight {list(shape)} with a scale for each {list(how.block)}"
        raise QCompilerError(problem, got=got, need=need, where=where)


def _without_scale(name: str, tensors: TensorFiles, scale: str | None = None) -> QCompilerError:
    got = f"{str(tensors.dtype(name)).removeprefix('torch.')}{list(tensors.shape(name))}"
    fix = "Without its scale nobody knows what numbers it stands for."
    return QCompilerError(
        f"a quantized weight has no scale: '{name}'", got=got, need=scale, where=str(tensors.folder), fix=fix
    )
