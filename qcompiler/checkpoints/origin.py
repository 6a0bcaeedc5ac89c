"""The original model that a checkpoint is written for: its tensors, names and files."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompiler import numerics
from qcompiler.capture.stored_weights import X_SCALE, Stored, held, one_number, stored_in, widened
from qcompiler.checkpoints.folders import CONFIG
from qcompiler.checkpoints.quantized_weight import QuantizedWeight, StoredAs
from qcompiler.numerics import ALL
from qcompiler.runtime.weights import tied_names


@dataclass(frozen=True)
class Origin:
    """The parts of a model that a checkpoint needs.

    Attributes:
        module: The module; its weights may be on the meta device.
        tensors: Name -> tensor, as in a float checkpoint.
        ties: Name -> all names of the same parameter, if it has several.
        twins: Name that the files omit -> the name of the weight that it is tied to.
        documents: JSON files of the checkpoint: the configuration, if the model has one.
        folder: The folder with the tokenizer, if any.
    """

    module: nn.Module
    tensors: Mapping[str, Tensor]
    ties: Mapping[str, tuple[str, ...]]
    twins: Mapping[str, str]
    documents: Mapping[str, Any]
    folder: Path | None

    def linears(self) -> Iterator[str]:
        """Names of the linear modules."""
        return (name for name, module in self.module.named_modules() if isinstance(module, nn.Linear))

    def stored(self) -> dict[str, StoredAs]:
        """Weights that the model itself holds as codes and scales."""
        found: dict[str, StoredAs] = {}
        for name, module in self.module.named_modules():
            stem = f"{name}." if name else ""
            for key, how in (held(module) or stored_in(module, name, self.module)).items():
                x_scale = stem + X_SCALE if key == "weight" and stem + X_SCALE in self.tensors else None
                prescale = None if how.prescale is None else stem + how.prescale
                found[stem + key] = StoredAs(stem + how.scale, how.format, x_scale, prescale=prescale)
        return found

    def quantized(self, name: str, how: StoredAs) -> QuantizedWeight:
        """One weight that the model holds as codes and scales."""
        codes = self.tensors[name]
        scale = widened(self.tensors[how.scale], numerics.scale_shape(codes.shape, how.format.block))
        prescale = None if how.prescale is None else self.tensors[how.prescale]
        weight = QuantizedWeight(codes, scale, how.format, prescale=prescale)
        if (x_scale := self._x_scale(name, how)) is None:
            return weight
        static = torch.tensor([[x_scale]], dtype=torch.float32)
        return replace(weight, x_format=how.format.with_block((ALL, ALL)), x_scale=static)

    def _x_scale(self, name: str, how: StoredAs) -> float | None:
        """The static activation scale of a weight."""
        if how.x_scale is not None:
            return one_number(self.tensors[how.x_scale], how.x_scale)
        stored = self._held(name)
        return None if stored is None else stored.x_scale

    def is_whole(self, name: str) -> bool:
        """Whether the files of a stack have one scale per matrix."""
        stored = self._held(name)
        return stored is not None and stored.whole

    def _held(self, name: str) -> Stored | None:
        path, _, key = name.rpartition(".")
        return held(self.module.get_submodule(path)).get(key)


def origin_of_module(module: nn.Module) -> Origin:
    """The origin for a model in memory."""
    state: dict[str, Tensor] = module.state_dict(keep_vars=True)
    tied: Mapping[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    twins = {name: source for name, source in tied.items() if state.get(name) is state.get(source) is not None}
    kept = {name: tensor for name, tensor in state.items() if name not in twins}
    tensors = {name: tensor.detach() for name, tensor in kept.items()}
    return Origin(module, tensors, tied_names(kept), twins, _documents(module), _folder(module))


def _documents(module: nn.Module) -> dict[str, Any]:
    """The configuration files that `save_pretrained` would write."""
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "to_json_string"):
        return {}
    written = json.loads(config.to_json_string())
    written.pop("quantization_config", None)
    dtypes = (tensor.dtype for tensor in module.parameters() if tensor.is_floating_point() and tensor.itemsize > 1)
    dtype = getattr(config, "dtype", None) or next(dtypes, torch.float32)
    documents = {
        CONFIG: {**written, "architectures": [type(module).__name__], "dtype": str(dtype).removeprefix("torch.")}
    }
    generation: Any = getattr(module, "generation_config", None)
    if hasattr(generation, "to_json_string"):
        documents["generation_config.json"] = json.loads(generation.to_json_string())
    return documents


def _folder(module: nn.Module) -> Path | None:
    """The folder that transformers loaded the model from."""
    path = getattr(getattr(module, "config", None), "name_or_path", "")
    return Path(path) if path and Path(path, CONFIG).is_file() else None
