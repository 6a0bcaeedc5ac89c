"""Makes a model of a checkpoint's folder: its architecture from transformers, its weights as the files have them.

Quantized weights stay codes and scales: modules hold them under the names of the files, and read them as numbers.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompiler.capture.quiet import third_party_silence
from qcompiler.capture.stored_weights import Stored, hold
from qcompiler.checkpoints.conversion import stacked, to_model
from qcompiler.checkpoints.quantized_weight import equal_bits
from qcompiler.checkpoints.reading import Checkpoint, read
from qcompiler.errors import QCompilerError

SHOWN = 5
"""So many names a message lists."""


def load_model(folder: "str | PathLike[str]") -> nn.Module:
    """The model of a folder with `config.json` and safetensors, on the CPU, in evaluation mode; without any network.

    Raises:
        QCompilerError: The folder is no checkpoint, or a broken one; transformers is missing, or does not know the
            architecture; names in the files are not those of the model.
    """
    checkpoint = read(folder)
    transformers = transformers_library()
    config = _config(transformers, checkpoint.folder)
    kind = _architecture(transformers, config, checkpoint)
    with third_party_silence():
        if not checkpoint.stored:
            return _plain(kind, config, checkpoint.folder).eval()
        model = _skeleton(kind, config)
    _fill(model, checkpoint)
    return model.eval()


def transformers_library() -> Any:
    """transformers; QCompilerError when it is not installed."""
    try:
        with third_party_silence():
            return import_module("transformers")
    except ImportError as error:
        fix = "Install it: pip install 'qcompiler[hf]'."
        raise QCompilerError("a model's architecture comes from transformers, which is missing", fix=fix) from error


def _config(transformers: Any, folder: Path) -> Any:
    try:
        with third_party_silence():
            return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each architecture checks its own configuration, in its own way
        problem = "transformers cannot read the configuration"
        raise QCompilerError(problem, got=_short(error), where=str(folder)) from error


def _architecture(transformers: Any, config: Any, checkpoint: Checkpoint) -> Any:
    """The class of the model; only those of transformers itself, since code of the folder is never run."""
    names = config.architectures or []
    kind = getattr(transformers, str(names[0]), None) if names else transformers.AutoModel
    models = (transformers.PreTrainedModel, transformers.AutoModel)
    if not isinstance(kind, type) or not issubclass(kind, models):
        got, where = repr(names[0]), str(checkpoint.folder)
        fix = "Make the model yourself and compile that; code inside of a checkpoint is never run."
        raise QCompilerError("transformers knows no such architecture", got=got, where=where, fix=fix)
    return kind


def _plain(kind: Any, config: Any, folder: Path) -> nn.Module:
    """A model in which nothing is quantized, as transformers loads it; but it must be complete."""
    try:
        model, info = kind.from_pretrained(
            folder, config=config, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # whatever transformers finds wrong
        raise QCompilerError("transformers cannot load the model", got=_short(error), where=str(folder)) from error
    if lost := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        problem = "the model has weights that are in no file, or there in another shape"
        raise QCompilerError(problem, got=_listed(lost), where=str(folder))
    loaded: nn.Module = model
    return loaded


def _skeleton(kind: Any, config: Any) -> nn.Module:
    """The model without numbers in its weights. What is no weight, such as frequencies of rotations, is computed."""
    del config.quantization_config
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    make = getattr(kind, "from_config", None) or kind._from_config  # an automatic class has the one, a model the other
    with import_module("transformers.initialization").no_init_weights():
        model: nn.Module = make(config, dtype=dtype)
    return model


def _fill(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Puts the tensors of the files into the model; QCompilerError where their names differ from its own."""
    tensors, stored = checkpoint.tensors, checkpoint.stored
    scales = {how.scale for how in stored.values()}
    plain = to_model(model, {name: tensors[name] for name in tensors if name not in scales and name not in stored})
    held: dict[str, tuple[Tensor, Tensor, tuple[int, int]]] = {}
    for block in {how.block for how in stored.values()}:
        names = [name for name, how in stored.items() if how.block == block]
        pairs = stacked(model, names, tensors.__getitem__, lambda name: tensors[stored[name].scale], block)
        held |= {name: (codes, scale, block) for name, (codes, scale) in pairs.items()}
    _check_names(model, {*plain, *held}, checkpoint)
    wanted, wide = {*model.state_dict()}, _kept_wide(model)
    suffix = "_scale_inv" if checkpoint.method == "fp8" else "_scale"
    for name in sorted(wanted & {*held}):
        _hold(model, name, *held[name], suffix)
    for name in sorted(wanted & {*plain}):
        _assign(model, name, plain[name], wide)
    _tie(model, plain, held)
    if (config := getattr(model, "config", None)) is not None:
        config._name_or_path = str(checkpoint.folder)


def _tie(model: nn.Module, plain: Mapping[str, Tensor], held: Collection[str]) -> None:
    """Makes one of what the model ties, but for two weights that differ in the files: transformers keeps those too."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for name, source in list(tied.items()):
        pair = {name, source}
        alike = pair <= plain.keys() and equal_bits(plain[name], plain[source])
        if pair <= {*plain, *held} and not alike:
            del tied[name]
    if callable(tie := getattr(model, "tie_weights", None)):
        tie(recompute_mapping=False)  # or what was taken out would be in again


def _check_names(model: nn.Module, found: set[str], checkpoint: Checkpoint) -> None:
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    state = {*model.state_dict()}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    strange = {name for name in found - state if not any(re.search(pattern, name) for pattern in ignored)}
    for problem, names in (
        ("the model has weights that are in no file", state - {*tied} - found),
        ("files have tensors that are not of the model", strange),
    ):
        if names:
            raise QCompilerError(problem, got=_listed(sorted(names)), where=str(checkpoint.folder))


def _hold(model: nn.Module, name: str, codes: Tensor, scale: Tensor, block: tuple[int, int], suffix: str) -> None:
    """Gives a module codes and scales in the place of a weight."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    weight = module._parameters[key]
    _check_shape(name, weight, codes)
    dtype = weight.dtype if weight is not None else torch.bfloat16
    module._parameters[key] = nn.Parameter(codes, requires_grad=False)
    module.register_parameter(key + suffix, nn.Parameter(scale, requires_grad=False))
    hold(module, {key: Stored(key + suffix, block, dtype)})


def _assign(model: nn.Module, name: str, tensor: Tensor, wide: "re.Pattern[str] | None") -> None:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    old = module._parameters[key] if key in module._parameters else module._buffers[key]
    _check_shape(name, old, tensor)
    if old is not None and tensor.is_floating_point() and not (wide and wide.search(name)):
        tensor = tensor.to(old.dtype)
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[key] = tensor


def _check_shape(name: str, wanted: Tensor | None, tensor: Tensor) -> None:
    if wanted is None or wanted.shape != tensor.shape:
        need = "nothing" if wanted is None else list(wanted.shape)
        raise QCompilerError(f"'{name}' has another shape than in the model", got=list(tensor.shape), need=need)


def _kept_wide(model: nn.Module) -> "re.Pattern[str] | None":
    """What transformers keeps in FP32 when the rest of a model is narrower."""
    lists = (getattr(model, key, None) or () for key in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    words = sorted({word for words in lists for word in words})
    return re.compile("|".join(rf"(?:^|\.){re.escape(word)}(?:\.|$)" for word in words)) if words else None


def _short(error: Exception) -> str:
    """The first line of somebody else's error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
