"""Folders that vLLM cannot run with these options: `vllm.LLM` raises one sentence, before it starts processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qcompiler
from qcompiler import QCompilerError

WHY = "needs vLLM: make engine"
vllm: Any = pytest.importorskip("vllm", reason=WHY)
plugin: Any = pytest.importorskip("qcompiler.vllm.config", reason=WHY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose inner width, 384, is three blocks, and whose keys are one block."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=256,
    )  # fmt: skip
    model: torch.nn.Module = LlamaForCausalLM(config)
    model.bfloat16().eval()
    written = tmp_path_factory.mktemp("checkpoint") / "llama"
    compiled = qcompiler.compile(model, scheme="fp8_tile", example_inputs=(torch.arange(12).reshape(1, 12),))
    compiled.save_checkpoint(written, "qcompiler", model=model)
    return written


def refused(folder: Path, gpus: int = 1) -> str:
    with pytest.raises(QCompilerError) as error:
        vllm.LLM(str(folder), tensor_parallel_size=gpus, skip_tokenizer_init=True, enforce_eager=True)
    return str(error.value)


def edited(folder: Path, into: Path, **keys: Any) -> Path:
    """A copy of a folder with other keys in its quantization configuration."""
    into.mkdir()
    for file in folder.iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    config = json.loads((into / "config.json").read_text())
    config["quantization_config"] |= keys
    (into / "config.json").write_text(json.dumps(config))
    return into


def test_a_number_of_gpus_that_cuts_a_block(folder: Path) -> None:
    assert refused(folder, 2) == (
        "tensor parallelism would cut 'model.layers.0.mlp.down_proj' inside a block: got 192 of 384 input channels on "
        "each GPU; need a multiple of 128. Use fewer GPUs, or a scheme without blocks for these layers: "
        'overrides={"*.down_proj": "fp8_row", "*.gate_proj": "fp8_row", "*.up_proj": "fp8_row", "*.q_proj": "fp8_row", '
        '"*.k_proj": "fp8_row", "*.v_proj": "fp8_row"}.'
    )


def test_a_folder_of_a_newer_qcompiler(folder: Path, tmp_path: Path) -> None:
    message = refused(edited(folder, tmp_path / "newer", version=99))
    assert message.startswith(
        "the checkpoint was written by a newer qcompiler: got version 99; need version 1 or older"
    )


def test_a_scheme_that_the_device_cannot_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        is_cuda = staticmethod(lambda: True)

    monkeypatch.setattr(plugin, "current_platform", Gpu)
    assert refused(edited(folder, tmp_path / "narrow", scheme="fp8_tile{k_block=16}")) == (
        "no GPU kernel runs the scheme 'fp8_tile{k_block=16}': with a weight in [128, 128] blocks, x needs [1, b] with "
        "b in 32, 64, 128, 256, 512, or [1, -1] or [-1, -1], not [1, 16]. Choose another scheme."
    )
