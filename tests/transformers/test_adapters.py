"""LoRA adapters of peft on quantized layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers_models import IDS, equal, llama_config, load, logits_of, saved

peft: Any = pytest.importorskip("peft")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # between peft and transformers
@pytest.mark.parametrize("scheme", ["fp8_tile", "int8_row"])
def test_adapters_train_and_load(tmp_path: Path, scheme: str) -> None:
    plain = saved(tmp_path / "plain", llama_config())
    model = load(plain, scheme)
    before = logits_of(model)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}  # peft's default
    assert torch.equal(logits_of(adapted), before)
    for _ in range(2):  # after one step only half of the factors differ from zero
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            for parameter in trained:
                parameter -= 0.5 * parameter.grad
                parameter.grad = None
    after = logits_of(adapted)
    assert not torch.equal(after, before)
    adapted.save_pretrained(tmp_path / "adapter")
    rounded = peft.PeftModel.from_pretrained(load(plain, scheme), tmp_path / "adapter", autocast_adapter_dtype=False)
    loaded = load(plain, scheme)
    loaded.load_adapter(str(tmp_path / "adapter"))  # keeps adapters in BF16, as without quantization
    assert torch.equal(logits_of(loaded), logits_of(rounded))
    again = load(plain, scheme)
    assert torch.equal(logits_of(peft.PeftModel.from_pretrained(again, tmp_path / "adapter")), after)
    assert equal(adapted.unload(), load(plain, scheme)), "training does not change quantized layers"
