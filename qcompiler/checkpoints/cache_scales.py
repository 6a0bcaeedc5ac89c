"""KV cache scales in a checkpoint: kept with the model, written back, and used by decoders with a static cache.

    self_attn.k_scale           self_attn.k_proj.k_scale          self_attn.k_proj.output_scale
    self_attn.v_scale           self_attn.v_proj.v_scale          self_attn.v_proj.output_scale
    self_attn.kv_scale          self_attn.qkv_proj.k_scale        self_attn.q_scale

Inference engines with an 8-bit KV cache use them, and so does a decoder with `kv_cache="fp8_static"`. A compiled model
returns keys and values in the dtype of the model and does not use them.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from passes.attention.cache_scales import CacheScales as ComputeScales
from passes.attention.kv_cache import CAUSAL, SCALES
from qcompiler.capture.stored_weights import USABLE, unusable
from qcompiler.checkpoints.files import TensorFiles
from qcompiler.checkpoints.quantized_weight import SCALE_DTYPES
from qcompiler.errors import QCompilerError
from qcompiler.program.program import Program

NAMES = re.compile(
    r"(?:^|\.)(?:[kvq]_scale|kv_scale|prob_scale|[kv]_zero_point|kv_cache_scaling_factor"
    r"|(?:k|v|qkv|kv)_proj\.output_scale)$"
)
"""Names that inference engines look for."""

ONE_SCALE = (
    re.compile(r"(?:(?P<module>.*?)\.)?(?:(?:[kv]|qkv|kv)_proj\.)?(?P<which>[kv]|kv)_(?:scale|cache_scaling_factor)"),
    re.compile(r"(?:(?P<module>.*?)\.)?(?P<which>k|v|qkv|kv)_proj\.output_scale"),
)
"""Names with the path of the attention module, and whether the scale is for keys, values or both."""

SCHEME = "kv_cache_scheme"
"""The configuration key for the quantization of the cache."""

_KEPT = "_qcompiler_cache_scales"


@dataclass(frozen=True)
class CacheScales:
    """KV cache scales and scheme of a checkpoint.

    Attributes:
        tensors: Scales by their names in the files.
        scheme: The `kv_cache_scheme`; None if the configuration has none.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    scheme: Mapping[str, Any] | None = None

    def __bool__(self) -> bool:
        """Whether the checkpoint has scales or a scheme."""
        return bool(self.tensors) or self.scheme is not None

    @property
    def note(self) -> str:
        """One sentence for the report."""
        count = len(self.tensors)
        kept = f"{count} scale{'s' * (count > 1)}" if count else "a scheme without scales"
        use = f', and used by a decoder with kv_cache="{self.format}"' if self.by_module else ""
        return f"the checkpoint has {kept} for an 8-bit key-value cache: kept and written back{use}"

    @property
    def format(self) -> str:
        """The format of a decoder's cache that has such scales."""
        return "int8_static" if self.scheme is not None and self.scheme.get("type") == "int" else "fp8_static"

    @property
    def by_module(self) -> dict[str, tuple[float, float]]:
        """The scales of keys and values by the path of the attention module, where both are one number."""
        keys, values = dict[str, float](), dict[str, float]()
        for name, tensor in self.tensors.items():
            found = next(filter(None, (pattern.fullmatch(name) for pattern in ONE_SCALE)), None)
            if found is not None and tensor.numel() == 1 and float(tensor) > 0:
                which = found["which"]
                for side, letter in ((keys, "k"), (values, "v")):
                    if letter in which:
                        side[found["module"]] = float(tensor)
        return {module: (keys[module], values[module]) for module in keys if module in values}


def is_cache_scale(name: str) -> bool:
    """Whether a tensor's name is the name of a KV cache scale."""
    return NAMES.search(name) is not None


def cache_scales_in(said: Mapping[str, Any], tensors: TensorFiles, taken: Collection[str], where: str) -> CacheScales:
    """The KV cache scales of a folder with quantized weights.

    Args:
        said: The `quantization_config`.
        tensors: All tensors of the folder.
        taken: Names that belong to quantized weights.
        where: The configuration file.

    Raises:
        QCompilerError: `kv_cache_scheme` is neither an object nor null; a scale has a wrong element type, or is not
            finite, or is negative.
    """
    scheme = said.get(SCHEME)
    if scheme is not None and not isinstance(scheme, dict):
        raise QCompilerError(f"'{SCHEME}' is malformed", got=repr(scheme), need="a JSON object, or null",
                             where=where)  # fmt: skip
    names = [name for name in tensors if is_cache_scale(name) and name not in taken]
    for name in names:
        if "scal" in name:
            _check(name, tensors)
    return CacheScales({name: tensors[name] for name in names}, scheme)


def _check(name: str, tensors: TensorFiles) -> None:
    """Checks the element type and values of a scale."""
    where = str(tensors.folder)
    if tensors.dtype(name) not in SCALE_DTYPES:
        got = str(tensors.dtype(name)).removeprefix("torch.")
        raise QCompilerError(f"a scale of the key-value cache has a wrong element type: '{name}'", got=got,
                             need="a floating-point type", where=where)  # fmt: skip
    if (why := unusable(tensors[name])) is not None:
        raise QCompilerError(f"a scale of the key-value cache is invalid: '{name}'", got=why, need=USABLE,
                             where=where)  # fmt: skip


def calibrated(program: Program) -> CacheScales:
    """The scales that the pass `cache-scales` computed, under names that inference engines look for."""
    formats = [step.format for step in program.settings.passes if isinstance(step, ComputeScales)]
    if not formats:
        return CacheScales()
    tensors = dict[str, Tensor]()
    for graph in program.stages.values():
        for op in graph.ops(CAUSAL):
            for name, attribute in zip(("k_scale", "v_scale"), SCALES, strict=True):
                if attribute in op.attrs:
                    tensors[f"{op.loc.module}.{name}"] = torch.tensor([op.attrs[attribute]])
    kind = "int" if formats[-1] == "int8_static" else "float"
    scheme = {"num_bits": 8, "type": kind, "strategy": "tensor", "dynamic": False, "symmetric": True}
    return CacheScales(tensors, scheme)


def keep(model: nn.Module, scales: CacheScales) -> None:
    """Attaches cache scales to a model, outside its state dict."""
    model.__dict__[_KEPT] = scales


def kept(model: nn.Module) -> CacheScales:
    """The cache scales from the checkpoint that a model was loaded from."""
    found: CacheScales = model.__dict__.get(_KEPT, CacheScales())
    return found
