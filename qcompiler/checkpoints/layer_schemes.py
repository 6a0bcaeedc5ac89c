"""Which scheme each layer of a folder has: the `quantization_config` of qcompiler's own checkpoints.

    {"quant_method": "qcompiler", "version": 1, "scheme": "fp8_tile",
     "overrides": {"lm_head": null, "model.layers.0.mlp.down_proj": "fp8_row"}}

`scheme` is the scheme of all linears except those in `overrides`, whose keys are full names of modules and whose values
are schemes, or null for a layer in float. They are not patterns: the keys of a JSON object have no order. An engine
that builds its layers before it reads tensors needs no other source.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qcompiler.checkpoints.config_keys import ANY, check_keys
from qcompiler.errors import QCompilerError
from qcompiler.schemes.named import spec_of
from qcompiler.schemes.pipelines import QuantizationSpec

METHOD = "qcompiler"
VERSION = 1  # of the configuration and of the names of tensors
SCALE, X_SCALE = "weight_scale", "input_scale"
"""Names of the tensors beside `weight`: scales, FP32 in the shape of `numerics.scale_shape`, and the static activation
scale, FP32 `[1]`."""

KEYS = dict.fromkeys(("quant_method", "version", "scheme", "overrides", "kv_cache_scheme"), ANY)
"""Known keys; their values are checked below and in `cache_scales`."""


@dataclass(frozen=True)
class LayerSchemes:
    """The schemes of the layers of a model.

    Attributes:
        scheme: The scheme of all linears that have no override, as text.
        overrides: Full name of a module -> its scheme; None for a layer in float.
    """

    scheme: str
    overrides: Mapping[str, str | None] = field(default_factory=dict)

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
        return cls(scheme, overrides)

    def config(self) -> dict[str, Any]:
        """The `quantization_config`."""
        said = {"quant_method": METHOD, "version": VERSION, "scheme": self.scheme}
        return {**said, "overrides": dict(self.overrides)} if self.overrides else said

    def of(self, module: str) -> str | None:
        """The scheme of a module, as text; None if it is in float."""
        return self.overrides.get(module, self.scheme)

    def spec(self, module: str) -> QuantizationSpec | None:
        """The quantization spec of a module; None if it is in float."""
        text = self.of(module)
        return None if text is None else self._specs[text]

    @cached_property
    def _specs(self) -> dict[str, QuantizationSpec]:
        texts = [self.scheme, *self.overrides.values()]
        return {text: spec_of(text) for text in texts if text is not None}
