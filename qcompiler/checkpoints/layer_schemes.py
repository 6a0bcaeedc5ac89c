"""Which scheme each layer of a folder has: the `quantization_config` of qcompiler's own checkpoints.

    {"quant_method": "qcompiler", "version": 1, "scheme": "fp8_tile",
     "overrides": {"lm_head": null, "model.layers.0.mlp.down_proj": "fp8_row"},
     "prescaled": ["model.layers.0.self_attn.o_proj"]}

`scheme` is the scheme of all linears except those in `overrides`, whose keys are full names of modules and whose values
are schemes, or null for a layer in float. They are not patterns: the keys of a JSON object have no order. `prescaled`
names the layers whose input is multiplied by a factor per channel, `PRESCALE`, before it is quantized. An engine that
builds its layers before it reads tensors needs no other source.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qcompiler.checkpoints.config_keys import ANY, check_keys
from qcompiler.errors import QCompilerError
from qcompiler.schemes.named import spec_of
from qcompiler.schemes.pipelines import QuantizationSpec

METHOD = "qcompiler"
VERSION = 1  # of the configuration and of the names of tensors
SCALE, X_SCALE, PRESCALE = "weight_scale", "input_scale", "input_prescale"
"""Names of the tensors beside `weight`: scales, FP32 in the shape of `numerics.scale_shape`, the static activation
scale, FP32 `[1]`, and the factors of the input channels, FP32 `[K]`."""

KEYS = dict.fromkeys(("quant_method", "version", "scheme", "overrides", "prescaled", "kv_cache_scheme"), ANY)
"""Known keys; their values are checked below and in `cache_scales`."""


@dataclass(frozen=True)
class LayerSchemes:
    """The schemes of the layers of a model.

    Attributes:
        scheme: The scheme of all linears that have no override, as text.
        overrides: Full name of a module -> its scheme; None for a layer in float.
        prescaled: Full names of the modules with factors of the input channels.
    """

    scheme: str
    overrides: Mapping[str, str | None] = field(default_factory=dict)
    prescaled: Collection[str] = frozenset()

    @classmethod
    def read(cls, said: Mapping[str, Any], where: str | None = None) -> "LayerSchemes":
        """Reads a `quantization_config`.

        Raises:
            QCompilerError: It was written by a newer qcompiler, a key or a scheme is unknown, or a value is malformed.
        """
        if type(version := said.get("version")) is not int or version < 1:
            raise QCompilerError("'version' is malformed", got=repr(version), need="a positive number", where=where)
        if version > VERSION:
            raise QCompilerError("the checkpoint was written by a newer qcompiler", got=f"version {version}",
                                 need=f"version {VERSION} or older", where=where,
                                 fix="Update qcompiler.")  # fmt: skip
        check_keys(said, KEYS, "the quantization configuration")
        scheme, overrides = said.get("scheme"), said.get("overrides") or {}
        if not isinstance(overrides, dict) or not isinstance(scheme, str):
            got = f"scheme {scheme!r} and overrides of type {type(overrides).__name__}"
            raise QCompilerError("the quantization configuration is malformed", got=got,
                                 need="'scheme', a string, and 'overrides', an object", where=where)  # fmt: skip
        for text in {scheme, *overrides.values()} - {None}:
            spec_of(text)
        found = cls(scheme, overrides, _prescaled(said.get("prescaled") or [], where))
        if wrong := sorted(name for name in found.prescaled if found.of(name) is None):
            raise QCompilerError("a layer in float is 'prescaled'", got=repr(wrong[0]), need="a scheme", where=where)
        return found

    def config(self) -> dict[str, Any]:
        """The `quantization_config`."""
        said: dict[str, Any] = {"quant_method": METHOD, "version": VERSION, "scheme": self.scheme}
        said |= {"overrides": dict(self.overrides)} if self.overrides else {}
        return said | ({"prescaled": sorted(self.prescaled)} if self.prescaled else {})

    def of(self, module: str) -> str | None:
        """The scheme of a module, as text; None if it is in float."""
        return self.overrides.get(module, self.scheme)

    def spec(self, module: str) -> QuantizationSpec | None:
        """The quantization spec of a module; None if it is in float."""
        text = self.of(module)
        return None if text is None else self.specs[text]

    @cached_property
    def specs(self) -> Mapping[str, QuantizationSpec]:
        """Each scheme in the configuration, as text -> its quantization spec."""
        texts = [self.scheme, *self.overrides.values()]
        return {text: spec_of(text) for text in texts if text is not None}


def _prescaled(said: Any, where: str | None) -> frozenset[str]:
    if not isinstance(said, list) or not all(isinstance(name, str) for name in said):
        raise QCompilerError("'prescaled' is malformed", got=repr(said), need="a list of names of modules", where=where)
    return frozenset(said)
