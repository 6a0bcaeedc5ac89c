"""Refuses folders in vLLM's main process, before it starts workers, if the workers could not load them.

vLLM asks `ModelConfig.verify_with_parallel_config` whether a model can be split, and the plug-in extends it. An error
in a worker is in the log only, and the user gets "Engine core initialization failed".
"""

from functools import cache, wraps
from pathlib import Path
from typing import Any

from vllm.config import ModelConfig, ParallelConfig

from qcompiler.checkpoints.files import TensorFiles
from qcompiler.checkpoints.layer_schemes import METHOD, SCALE, LayerSchemes
from qcompiler.vllm.cuts import Split, check_cuts


@cache
def install() -> None:
    """Adds the check to vLLM's, once in a process."""
    verify = ModelConfig.verify_with_parallel_config

    @wraps(verify)
    def verify_both(self: ModelConfig, parallel_config: ParallelConfig) -> None:
        verify(self, parallel_config)
        check(self, parallel_config.tensor_parallel_size)

    ModelConfig.verify_with_parallel_config = verify_both


def check(model: Any, gpus: int) -> None:
    """Raises QCompilerError if tensor parallelism would cut a layer of a folder that qcompiler wrote inside a block.

    Workers check folders of vLLM's own methods, folders that are not on this machine yet, and models with several
    parts, such as vision models.

    Args:
        model: vLLM's configuration of the model.
        gpus: GPUs that share each layer.
    """
    said = model.model_arch_config.quantization_config
    if gpus == 1 or model.quantization != METHOD or said is None or said["quant_method"] != METHOD:
        return
    folder, text = Path(model.model), model.hf_text_config
    if model.hf_config is not text or not folder.is_dir():
        return
    files = TensorFiles(folder)
    layers = [name.removesuffix(f".{SCALE}") for name in files if name.endswith(f".{SCALE}")]
    shapes = {layer: files.shape(f"{layer}.weight") for layer in layers}
    styles = getattr(text, "base_model_tp_plan", None) or {}
    split = Split(gpus, styles, model.get_total_num_kv_heads(), model.get_head_size())
    check_cuts(shapes, LayerSchemes.read(said, "quantization_config"), split)
