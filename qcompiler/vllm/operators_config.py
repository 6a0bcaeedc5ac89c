"""What all configurations of linears over qcompiler's operators tell vLLM."""

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from qcompiler.checkpoints.layer_schemes import METHOD


class OperatorsConfig(QuantizationConfig):
    """A configuration whose linears run qcompiler's operators."""

    @classmethod
    def get_name(cls) -> str:
        """The `quant_method`."""
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Dtypes that the kernels quantize and write."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Hopper."""
        return 90

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in `config.json`."""
        return []
