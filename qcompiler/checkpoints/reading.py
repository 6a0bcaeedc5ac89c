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
from qcompiler.capture.stored_weights import USABLE, unusable, widened
from qcompiler.checkpoints import block_fp8, compressed_groups, compressed_tensors
from qcompiler.checkpoints.declarations import declared, unread
from qcompiler.checkpoints.files import TensorFiles, read_json
from qcompiler.checkpoints.folders import CONFIG, INDEX, SINGLE
from qcompiler.checkpoints.quantized_weight import SCALE_DTYPES, QuantizedWeight, StoredAs
from qcompiler.errors import QCompilerError, did_you_mean

READERS = {block_fp8.METHOD: block_fp8.stored_weights, compressed_tensors.METHOD: compressed_groups.stored_weights}
"""`quant_method` -> what finds the quantized weights of a folder."""

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SHOWN = 5  # names that a message lists


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
        QCompilerError: A file is missing or broken; the quantization is of a kind that is not known, or has a key that
            is not; a quantized weight has no scale, or one that does not fit, or is not finite, or is negative.
    """
    path = Path(folder)
    tensors = TensorFiles(path)
    config = read_json(path / CONFIG)
    if (other := config.get("transformers_weights")) not in (None, SINGLE, INDEX):
        raise QCompilerError("the configuration names other files of weights", got=repr(other), need=SINGLE,
                             where=str(path / CONFIG))  # fmt: skip
    said = declared(config, str(path / CONFIG))
    stored = {} if said is None else _stored(said, tensors, str(path / CONFIG))
    for name, how in stored.items():
        _check(name, how, tensors)
    for name in tensors:
        if name not in stored and tensors.dtype(name) in FP8:
            raise _without_scale(name, tensors, fix=unread(path, config) if said is None else None)
    return Checkpoint(path, config, tensors, stored, said["quant_method"] if said is not None else None)


def _stored(said: Mapping[str, Any], tensors: TensorFiles, where: str) -> Mapping[str, StoredAs]:
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
    """Holds a scale to its type, its shape and its values: scales are small enough to be read here."""
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
    if (why := unusable(tensors[how.scale])) is not None:
        raise QCompilerError(f"the scale of '{name}' is not a scale", got=why, need=USABLE, where=where)


def _without_scale(name: str, tensors: TensorFiles, scale: str | None = None, fix: str | None = None) -> QCompilerError:
    got = f"{str(tensors.dtype(name)).removeprefix('torch.')}{list(tensors.shape(name))}"
    need = f"'{scale}'" if scale else f"a 'quantization_config' in {CONFIG} that says where its scale is"
    module = name.rpartition(".")[0] + "."
    beside = [other for other in tensors if other.startswith(module) and "scale" in other[len(module) :]]
    advice = [fix] if fix else []
    if beside:
        advice.append(f"Beside it is {', '.join(map(repr, beside[:SHOWN]))}, a name that is not read as its scale.")
    elif scale:
        advice.append("Without a scale its numbers are not known.")
    return QCompilerError(f"a quantized weight has no scale: '{name}'", got=got, need=need, where=str(tensors.folder),
                          fix=" ".join(advice) or None)  # fmt: skip
