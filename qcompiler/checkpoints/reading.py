"""Reads a checkpoint folder: configuration, tensors and quantized weights, in one common form.

Reading runs no code from the folder and builds no model. Every mismatch is an error that names the file and the tensor.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.capture.stored_weights import USABLE, unusable, widened
from qcompiler.checkpoints.cache_scales import CacheScales, cache_scales_in
from qcompiler.checkpoints.companions import FP8
from qcompiler.checkpoints.declarations import declared, unread
from qcompiler.checkpoints.files import TensorFiles, read_json
from qcompiler.checkpoints.folders import CONFIG, INDEX, SINGLE
from qcompiler.checkpoints.format import CheckpointFormat, format_read, names, our_formats
from qcompiler.checkpoints.layer_schemes import LayerSchemes
from qcompiler.checkpoints.quantized_weight import SCALE_DTYPES, QuantizedWeight, StoredAs, not_finite
from qcompiler.errors import QCompilerError, did_you_mean
from qcompiler.numerics import ALL
from qcompiler.program.folder_kinds import checked_path

SHOWN = 5  # names that a message lists at most


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that was read.

    Attributes:
        folder: The path.
        config: The content of `config.json`.
        tensors: All tensors by their names in the files, each read on demand.
        stored: How each quantized weight is stored.
        format: The format of the quantized weights; None if the configuration declares no quantization.
        cache: The KV cache scales.
        notes: Other report notes about the checkpoint, one sentence each.
        is_float: Whether the configuration quantizes only the KV cache or activations, not weights.
        schemes: The scheme of each layer, if the configuration declares them.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: TensorFiles
    stored: Mapping[str, StoredAs]
    format: CheckpointFormat | None
    cache: CacheScales = field(default_factory=CacheScales)
    notes: tuple[str, ...] = ()
    is_float: bool = False
    schemes: LayerSchemes | None = None

    @property
    def method(self) -> str | None:
        """The `quant_method`; None if the configuration declares no quantization."""
        return None if self.format is None else self.format.name

    @property
    def beside(self) -> set[str]:
        """Names of all tensors that belong to quantized weights, except codes."""
        return {name for how in self.stored.values() for name in how.beside}

    def codes(self, name: str) -> Tensor:
        """The codes of a quantized weight. Raises QCompilerError if one is NaN or infinite."""
        codes = self.tensors[name]
        if (why := not_finite(codes)) is not None:
            fix = "The file may be damaged: copy it again."
            raise QCompilerError(
                "a code of a quantized weight is not a number",
                got=why,
                need="finite codes",
                where=self.tensors.place(name),
                fix=fix,
            )
        return codes

    def quantized(self, name: str) -> QuantizedWeight:
        """A quantized weight as codes and scales. Raises QCompilerError if a code is NaN or infinite."""
        how, codes = self.stored[name], self.codes(name)
        weight = QuantizedWeight(codes, self.scale(name), how.format, prescale=self.prescale(name))
        if how.x_scale is None:
            return weight
        return replace(weight, x_format=how.format.with_block((ALL, ALL)), x_scale=self.x_scale(name))

    def stored_scale(self, name: str) -> Tensor:
        """The scales of a quantized weight in the element type of the file."""
        how = self.stored[name]
        return self.tensors[how.scale].reshape(numerics.scale_shape(self.tensors.shape(name), how.format.block))

    def x_scale(self, name: str) -> Tensor | None:
        """The static activation scale of a quantized weight, FP32 `[1, 1]`; for experts `[E, 1]`."""
        how = self.stored[name]
        return None if how.x_scale is None else self.tensors[how.x_scale].to(torch.float32).reshape(-1, 1)

    def prescale(self, name: str) -> Tensor | None:
        """The factors of the input channels of a quantized weight, FP32 `[K]`."""
        how = self.stored[name]
        return None if how.prescale is None else self.tensors[how.prescale]

    def scale(self, name: str) -> Tensor:
        """The scales of a quantized weight, in FP32 and in the shape of `numerics.scale_shape`."""
        how = self.stored[name]
        return widened(self.tensors[how.scale], numerics.scale_shape(self.tensors.shape(name), how.format.block))


def read(folder: "str | PathLike[str]") -> Checkpoint:
    """Reads a safetensors checkpoint, quantized or not.

    Raises:
        QCompilerError: A file is missing or broken; the quantization method or one of its keys is unknown; a quantized
            weight has no scale, or its scale has the wrong shape, is not finite, or is negative.
    """
    path = checked_path(folder)
    tensors = TensorFiles(path)
    config = read_json(path / CONFIG)
    if (other := config.get("transformers_weights")) not in (None, SINGLE, INDEX):
        raise QCompilerError(
            "the configuration refers to other weight files", got=repr(other), need=SINGLE, where=str(path / CONFIG)
        )
    declaration = _declaration(config, path)
    found = {} if declaration is None else _stored(*declaration, tensors)
    stored = {name: _by_expert(name, how, tensors) for name, how in found.items()}
    unscaled = [name for name, how in stored.items() if how.x_scale is not None and how.x_scale not in tensors]
    stored |= {name: replace(stored[name], x_scale=None) for name in unscaled}
    for name, how in stored.items():
        _check(name, how, tensors)
    beside = {name for how in stored.values() for name in how.beside}
    for name in tensors:
        if name not in beside and name not in stored and tensors.dtype(name) in FP8:
            raise _without_scale(name, tensors, fix=unread(path, config) if declaration is None else None)
    if declaration is None:
        return Checkpoint(path, config, tensors, stored, None)
    format, said, where = declaration
    cache = cache_scales_in(said, tensors, beside, where)
    notes = (*format.notes(said), *_missing_scales(unscaled), *([cache.note] if cache else ()))
    is_float, schemes = format.is_float(said), format.schemes(said)
    return Checkpoint(path, config, tensors, stored, format, cache, notes, is_float, schemes)


def _said(config: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The quantization configuration and its file; some formats have a separate file, alone or in addition."""
    said, where = declared(config, str(folder / CONFIG)), str(folder / CONFIG)
    for format in our_formats().values():
        named = said is None or said.get("quant_method") == format.name
        if named and (separate := format.separate(folder, said)) is not None:
            return separate
    return said, where


def _declaration(config: Mapping[str, Any], folder: Path) -> tuple[CheckpointFormat, Mapping[str, Any], str] | None:
    """The format of a folder, the quantization configuration and its file; None if nothing is declared."""
    said, where = _said(config, folder)
    if said is None:
        return None
    method = said.get("quant_method")
    if (format := format_read(method)) is None:
        known = names(lambda format: format.declared)
        raise QCompilerError(
            "an unknown kind of quantization",
            got=f"quant_method {method!r}",
            where=where,
            fix=did_you_mean(str(method), known),
        )
    return format, said, where


def _stored(
    format: CheckpointFormat, said: Mapping[str, Any], where: str, tensors: TensorFiles
) -> Mapping[str, StoredAs]:
    try:
        return format.read(said, tensors)
    except QCompilerError as error:
        error.where = f"{where}, {error.where}" if error.where else where
        raise


def _missing_scales(weights: Sequence[str]) -> Iterator[str]:
    """A note about weights without the static activation scale that the configuration declares."""
    if weights:
        yield (
            f"the checkpoint declares static activation scales, but has none for {len(weights)} weights, such as "
            f"'{weights[0]}': the scales of their activations come from calibration, or are computed in each call"
        )


def _by_expert(name: str, how: StoredAs, tensors: TensorFiles) -> StoredAs:
    """Adjusts the block for stacked experts: one scale per expert, or one per last index."""
    shape = tensors.shape(name)
    if len(shape) != 3 or 0 in shape or how.scale not in tensors:
        return how
    scales = tensors.shape(how.scale)
    if how.format.block == (ALL, ALL) and scales in (shape[:1], (shape[0], 1), (shape[0], 1, 1)):
        return replace(how, format=how.format.with_block((shape[1], ALL)))
    if how.format.block == (1, ALL) and scales == (shape[0], 1, shape[2]):  # the model has [E, K, N]
        return replace(how, format=how.format.with_block((shape[1], 1)))
    return how


def _check(name: str, how: StoredAs, tensors: TensorFiles) -> None:
    """Checks the type, shape and values of a scale; scales are small enough to be read here."""
    where = f"{tensors.folder}: {how.scale}"
    if how.scale not in tensors:
        raise _without_scale(name, tensors, how.scale)
    if tensors.dtype(how.scale) not in SCALE_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in SCALE_DTYPES)
        raise QCompilerError("a scale has a wrong element type", got=tensors.dtype(how.scale), need=known, where=where)
    shape, got = tensors.shape(name), list(tensors.shape(how.scale))
    if len(shape) not in (2, 3):
        problem = f"the quantized weight '{name}' is neither a matrix nor a stack of matrices"
        raise QCompilerError(problem, got=list(shape), where=str(tensors.folder))
    need = numerics.scale_shape(shape, how.format.block)
    alike = [need, *([need[:-1]] if need[-1] == 1 else []), *([[]] if need == [1, 1] else [])]
    alike += [[need[0], 1, need[1], 1]] if len(shape) == 2 else []  # ModelOpt's blocks
    alike += [need[:1]] if need[1:] == [1, 1] else []
    if got not in alike:
        problem = f"the scale does not fit its weight {list(shape)} with a scale for each {list(how.format.block)}"
        raise QCompilerError(problem, got=got, need=need, where=where)
    if (why := unusable(tensors[how.scale])) is not None:
        raise QCompilerError(f"the scale of '{name}' is not a valid scale", got=why, need=USABLE, where=where)


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
    return QCompilerError(
        f"a quantized weight has no scale: '{name}'",
        got=got,
        need=need,
        where=str(tensors.folder),
        fix=" ".join(advice) or None,
    )
