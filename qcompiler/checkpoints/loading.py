"""Loads a model from a checkpoint folder: the architecture from transformers, the weights from the files.

Quantized weights stay codes and scales: modules hold them under the names in the files, and dequantize them when read.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompiler.capture.quiet import third_party_silence
from qcompiler.capture.stand_ins import stand_in
from qcompiler.capture.stored_weights import Stored, add_notes, hold
from qcompiler.checkpoints.cache_scales import keep
from qcompiler.checkpoints.conversion import names_in_model, to_model
from qcompiler.checkpoints.declarations import undeclare
from qcompiler.checkpoints.fitting import check_complete, check_element_types, check_names, check_shape
from qcompiler.checkpoints.layer_schemes import PRESCALE, LayerSchemes
from qcompiler.checkpoints.quantized_weight import equal_bits
from qcompiler.checkpoints.reading import Checkpoint, read
from qcompiler.checkpoints.slices import sources
from qcompiler.checkpoints.stacking import Part, stacked
from qcompiler.errors import QCompilerError

_SCHEMES = "_qcompiler_schemes"


@dataclass(frozen=True)
class Held:
    """A quantized weight as a module holds it; tied modules share the parameters.

    Attributes:
        codes: `[N, K]`, or `[E, N, K]`.
        scale: In the element type of the files.
        part: How the weight is stored, and its source tensors.
        x_scale: The static scale of the activation; None for stacked experts.
        prescale: The factors of the input channels, if there are any.
    """

    codes: nn.Parameter
    scale: nn.Parameter
    part: Part
    x_scale: float | None
    prescale: nn.Parameter | None = None


def load_model(folder: "str | PathLike[str] | Checkpoint") -> nn.Module:
    """Loads the model of a folder with `config.json` and safetensors, on the CPU, in eval mode, without network access.

    Args:
        folder: The path, or the result of `read`.

    Raises:
        QCompilerError: The folder is not a checkpoint, or is broken; transformers is missing, does not know the
            architecture, or cannot build the model; the tensors do not match the model, or floating-point weights are
            stored as integers.
    """
    checkpoint = folder if isinstance(folder, Checkpoint) else read(folder)
    with _model_of(checkpoint) as (transformers, kind, config):
        if checkpoint.format is None:
            with _one_sentence("transformers cannot load the model", checkpoint.folder):
                model = _in_float(kind, config, checkpoint)
        else:
            model = _skeleton(kind, config, checkpoint)
            _fill(model, checkpoint)
        _finish(transformers, model, checkpoint)
    return model.eval()


def load_in_slices(folder: "str | PathLike[str] | Checkpoint", device: torch.device) -> nn.Module:
    """Loads the same model as `load_model`, but matrices are stand-ins that share memory (see `capture.stand_ins`).

    A captured graph gets their values from the files when a pass first reads them, or only a part of them.

    Args:
        folder: The path, or the result of `read`.
        device: Where the model runs.

    Raises:
        QCompilerError: As for `load_model`.
    """
    checkpoint = folder if isinstance(folder, Checkpoint) else read(folder)
    with _model_of(checkpoint) as (transformers, kind, config):
        model = _skeleton(kind, config, checkpoint)
        read_later = sources(model, checkpoint, device)
        outline = replace(checkpoint, tensors=checkpoint.tensors.without_data(read_later.names))
        _fill(model, outline)
        model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
        stand_in(model, read_later.by_target, device)
        add_notes(model, read_later.notes())
        _finish(transformers, model, checkpoint)
    return model.eval()


@contextmanager
def _model_of(checkpoint: Checkpoint) -> "Iterator[tuple[Any, Any, Any]]":
    """The transformers module, and the class and configuration of a model; other packages are silent in the block."""
    _check_declared(checkpoint)
    transformers = transformers_library()
    config = _config(transformers, checkpoint.folder)
    kind = _architecture(transformers, config, checkpoint)
    with third_party_silence():
        yield transformers, kind, config


def _check_declared(checkpoint: Checkpoint) -> None:
    """Raises QCompilerError if the configuration declares quantized weights, but none is quantized."""
    if checkpoint.format is not None and not checkpoint.stored and not checkpoint.is_float:
        fix = "If its weights are in floating point, remove 'quantization_config' from config.json."
        got, where = f"quant_method {checkpoint.method!r}", str(checkpoint.folder)
        raise QCompilerError("no weight is quantized as the checkpoint declares", got=got, where=where, fix=fix)


def transformers_library() -> Any:
    """The transformers module. Raises QCompilerError if it is not installed."""
    try:
        with third_party_silence():
            return import_module("transformers")
    except ImportError as error:
        fix = "Install it: pip install 'qcompiler[hf]'."
        raise QCompilerError("loading a model needs transformers, which is not installed", fix=fix) from error


def _config(transformers: Any, folder: Path) -> Any:
    """The model's configuration without quantization, so that transformers does not quantize."""
    with _one_sentence("transformers cannot read the configuration", folder), third_party_silence():
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    undeclare(config)
    return config


def _architecture(transformers: Any, config: Any, checkpoint: Checkpoint) -> Any:
    """The model class, from transformers only: code in the folder is never run."""
    names, where = config.architectures or [None], str(checkpoint.folder)
    if not isinstance(names, list):
        raise QCompilerError("'architectures' in config.json is not a list", got=repr(names), where=where)
    with _one_sentence("transformers cannot load the architecture", checkpoint.folder):
        if names[0] is None:  # the base model; a few configurations map to several classes
            kind = transformers.MODEL_MAPPING[type(config)]
            return kind[0] if isinstance(kind, list | tuple) else kind
        kind = getattr(transformers, str(names[0]), None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    fix = "Make the model yourself and compile that; code in a checkpoint is never run."
    raise QCompilerError("transformers does not know the architecture", got=repr(names[0]), where=where, fix=fix)


def _in_float(kind: Any, config: Any, checkpoint: Checkpoint) -> nn.Module:
    """A float model, loaded by transformers from the given tensors."""
    model: nn.Module
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=dict(checkpoint.tensors),
        dtype="auto",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    other = [f"{name} {list(got)}, not {list(need)}" for name, got, need in info["mismatched_keys"]]
    check_complete(model, info["missing_keys"], info["unexpected_keys"], checkpoint, other)
    check_element_types(model, checkpoint)
    return model


def _skeleton(kind: Any, config: Any, checkpoint: Checkpoint) -> nn.Module:
    """The model with weights on the meta device; other buffers, such as RoPE frequencies, are computed."""
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else _usual_dtype(checkpoint)
    with (
        _one_sentence("transformers cannot build the model", checkpoint.folder),
        import_module("transformers.initialization").no_init_weights(),
    ):
        model: nn.Module = kind._from_config(config, dtype=dtype)
    return model


def _usual_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The first 16-bit dtype of a float weight; scales may have another one. In a float checkpoint, the first dtype."""
    beside = checkpoint.beside
    dtypes = (checkpoint.tensors.dtype(name) for name in checkpoint.tensors if name not in beside)
    if checkpoint.format is None:
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.get_default_dtype())
    return next((dtype for dtype in dtypes if dtype in (torch.bfloat16, torch.float16)), torch.bfloat16)


def _fill(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Assigns the tensors of the files to the model. Raises QCompilerError if names differ."""
    suffix = "" if checkpoint.format is None else checkpoint.format.scale_suffix
    tensors, stored = checkpoint.tensors, checkpoint.stored
    aside = checkpoint.beside | stored.keys() | (checkpoint.cache.tensors.keys() - model.state_dict().keys())
    given = {name: tensors[name] for name in tensors if name not in aside}
    plain = to_model(model, given, exact=checkpoint.format is not None)
    held: dict[str, Held] = {}
    factors: dict[bytes, nn.Parameter] = {}  # layers that read one activation share them, and its quantization
    for format in {how.format for how in stored.values()}:
        names = [name for name, how in stored.items() if how.format == format]
        parts = stacked(model, names, checkpoint.codes, checkpoint.stored_scale, format)
        held |= {name: _held(part, checkpoint, factors) for name, part in parts.items()}
    check_names(model, {*plain, *held}, checkpoint)
    check_element_types(model, checkpoint)
    wanted, wide = {*model.state_dict()}, _kept_wide(model)
    for name in sorted(wanted & {*held}):
        _hold(model, name, held[name], suffix)
    for name in sorted(wanted & {*plain}):
        _assign(model, name, plain[name], wide)
    _tie(model, plain, held, suffix)
    add_notes(model, _unused_scales((each.part for each in held.values()), checkpoint))


def _finish(transformers: Any, model: nn.Module, checkpoint: Checkpoint) -> None:
    """Attaches the remaining metadata: the source folder, the generation configuration, and unused scales."""
    folder = checkpoint.folder
    if checkpoint.cache:
        keep(model, checkpoint.cache)
    if checkpoint.schemes is not None:
        model.__dict__[_SCHEMES] = _in_model(checkpoint.schemes, model)
    add_notes(model, checkpoint.notes)
    if (config := getattr(model, "config", None)) is not None:
        config._name_or_path = str(folder)
    if hasattr(model, "generation_config") and (folder / "generation_config.json").is_file():
        with _one_sentence("transformers cannot read the generation configuration", folder):
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)


def schemes_of(model: nn.Module) -> LayerSchemes | None:
    """The schemes that the checkpoint of a model declares, under the model's names; None if it declares none."""
    found: LayerSchemes | None = model.__dict__.get(_SCHEMES)
    return found


def _in_model(schemes: LayerSchemes, model: nn.Module) -> LayerSchemes:
    """Translates names in the files; drops those that the model does not have, such as parts of stacked weights."""
    names = {f"{name}.weight": scheme for name, scheme in schemes.overrides.items()}
    places, state = names_in_model(model, names), model.state_dict()
    kept = {places[name]: scheme for name, scheme in names.items() if places[name] in state}
    factors = names_in_model(model, {f"{name}.weight" for name in schemes.prescaled})
    return LayerSchemes(
        schemes.scheme,
        {name.removesuffix(".weight"): scheme for name, scheme in kept.items()},
        {name.removesuffix(".weight") for name in factors.values()},
    )


def _held(part: Part, checkpoint: Checkpoint, factors: dict[bytes, nn.Parameter]) -> Held:
    x_scale = None if _is_stack(part) else checkpoint.x_scale(part.sources[0])
    prescale = None if _is_stack(part) else checkpoint.prescale(part.sources[0])
    if _is_stack(part) and (names := [name for name in part.sources if checkpoint.stored[name].prescale is not None]):
        got, need = f"factors of input channels for '{names[0]}'", "none for weights that the model stacks"
        raise QCompilerError("the model has no place for a tensor of the files", got=got, need=need)
    return Held(
        _fixed(part.codes), _fixed(part.scale), part, None if x_scale is None else float(x_scale),
        None if prescale is None else factors.setdefault(prescale.numpy().tobytes(), _fixed(prescale)),
    )  # fmt: skip


def _is_stack(part: Part) -> bool:
    """Whether a weight stacks several experts."""
    return len(part.sources) > 1 or part.codes.dim() > 2


def _unused_scales(parts: Iterable[Part], checkpoint: Checkpoint) -> Iterator[str]:
    """Notes that activation scales of experts are dropped."""
    stacks = [part for part in parts if _is_stack(part)]
    names = [name for part in stacks for name in part.sources if checkpoint.stored[name].x_scale is not None]
    if names:
        yield (
            f"the checkpoint has static activation scales for {len(names)} weights of experts, such as '{names[0]}': "
            "not used, since activations of experts are scaled in each call"
        )


def _tie(model: nn.Module, plain: Mapping[str, Tensor], held: Mapping[str, Held], suffix: str) -> None:
    """Ties weights as the model does, except two that differ in the files: transformers keeps both as well."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    found = {*plain, *held}
    quantized: dict[str, str] = {}
    for name, source in list(tied.items()):
        pair = {name, source}
        if pair <= found and not (pair <= plain.keys() and equal_bits(plain[name], plain[source])):
            del tied[name]
        elif pair & held.keys():
            quantized[name] = tied.pop(name)
    if callable(tie := getattr(model, "tie_weights", None)):
        # Use this mapping, or removed names would return; the source may be the name that is missing from the files.
        tie(missing_keys={*model.state_dict()} - found, recompute_mapping=False)
    for name in sorted(quantized, key=lambda name: name not in held):
        given, taking = (name, quantized[name]) if name in held else (quantized[name], name)
        held = {**held, taking: held[given]}
        _hold(model, taking, held[given], suffix)
    tied |= quantized


def _hold(model: nn.Module, name: str, stored: Held, suffix: str) -> None:
    """Replaces a module's weight with codes and scales."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    weight, part = module._parameters[key], stored.part
    check_shape(name, weight, stored.codes)
    dtype = weight.dtype if weight is not None else torch.bfloat16
    module._parameters[key] = stored.codes
    module.register_parameter(key + suffix, stored.scale)
    if stored.prescale is not None:
        if not isinstance(module, nn.Linear):
            raise QCompilerError(f"'{name}' has factors of input channels", got=type(module).__name__, need="a linear")
        module.register_parameter(PRESCALE, stored.prescale)
    prescale = None if stored.prescale is None else PRESCALE
    hold(module, {key: Stored(key + suffix, part.format, dtype, stored.x_scale, part.whole, prescale)})


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _assign(model: nn.Module, name: str, tensor: Tensor, wide: "re.Pattern[str] | None") -> None:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    old = module._parameters[key] if key in module._parameters else module._buffers[key]
    check_shape(name, old, tensor)
    if old is not None and tensor.is_floating_point() and not (wide and wide.search(name)):
        tensor = tensor.to(old.dtype)
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[key] = tensor


def _kept_wide(model: nn.Module) -> "re.Pattern[str] | None":
    """Pattern of the names that transformers keeps in FP32 in a narrower model."""
    lists = (getattr(model, key, None) or () for key in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    words = sorted({word for words in lists for word in words})
    return re.compile("|".join(rf"(?:^|\.){re.escape(word)}(?:\.|$)" for word in words)) if words else None


@contextmanager
def _one_sentence(problem: str, folder: Path) -> Iterator[None]:
    """Converts any transformers exception into a QCompilerError with its first line."""
    try:
        yield
    except QCompilerError:
        raise
    except Exception as error:
        first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        first = f"{first} {rest[0]}" if first.endswith(":") and rest else first
        got = f"{type(error).__name__}: {first}" if first else type(error).__name__
        raise QCompilerError(problem, got=got, where=str(folder)) from error
