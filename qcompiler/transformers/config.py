"""`QCompilerConfig`: which layers of a transformers model are quantized, and how.

    QCompilerConfig("fp8_tile")
    QCompilerConfig("fp8_tile{k_block=64}", overrides={"*.down_proj": "fp8_row"}, ignore=["*.o_proj"])

In the `config.json` of a saved model it is `{"quant_method": "qcompiler", "version": 1, "scheme": ..., ...}`, as in the
checkpoints that the compiler writes: see `qcompiler.checkpoints.layer_schemes`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from qcompiler.checkpoints.layer_schemes import METHOD, VERSION, LayerSchemes
from qcompiler.schemes.named import with_ignored

DEFAULT_SCHEME = "fp8_tile"


class QCompilerConfig(QuantizationConfigMixin):
    """The schemes of the layers, with the grammar and the meaning of the arguments of `qcompiler.compile`.

    Args:
        scheme: A scheme, with optional arguments in braces: "fp8_tile{k_block=64}".
        overrides: Another scheme for some layers, or None to keep them in float: `{"*.down_proj": "fp8_row"}`. The last
            match applies. A pattern that names a layer quantizes it even if it is a router, a vocabulary projection or
            tiny.
        ignore: Patterns for layers to keep in float; they apply after all overrides.
        version: Version of the configuration of a saved model.
        prescaled: Layers of a saved model with factors of the input channels, which only calibration finds.
        others: Other entries of a saved configuration; unknown ones are errors.

    Attributes:
        schemes: The schemes by layer. Once a float model is loaded, its overrides name every layer that has another
            scheme, or none.

    Raises:
        QCompilerError: A newer qcompiler wrote the configuration, or an entry is unknown or malformed.
        PassError: A scheme or an option is unknown.
    """

    def __init__(
        self,
        scheme: str = DEFAULT_SCHEME,
        overrides: Mapping[str, str | None] | None = None,
        ignore: Sequence[str] = (),
        version: int = VERSION,
        prescaled: Sequence[str] = (),
        **others: Any,
    ) -> None:
        self.quant_method: Any = METHOD  # transformers' enumeration of methods is closed
        said = {"version": version, "scheme": scheme, "overrides": with_ignored(overrides, ignore), **others}
        said |= {"prescaled": [*prescaled]} if prescaled else {}
        self.schemes = LayerSchemes.read({**said, "quant_method": METHOD})

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of a `config.json`."""
        return self.schemes.config()
