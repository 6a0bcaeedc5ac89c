"""The passes of a target run last: after those of a scheme, and after `kv-cache` for a decoder."""

from typing import Any

import pytest
import torch
import transformers as hf

import qcompiler
from codegen.targets.hopper import HOPPER
from qcompiler.runtime import device
from qcompiler.runtime.device import Target, register

IDS = torch.tensor([[5, 9, 31, 7, 2, 8, 4]])


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> str:
    """A CPU target that fuses as a GPU target does; its kernels are the torch definitions."""
    monkeypatch.setattr(device, "_TARGETS", dict(device.known_targets()))
    return register(Target("fusing", "cpu", "a CPU that fuses", passes=HOPPER.passes)).name


def llama() -> Any:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model: Any = hf.LlamaForCausalLM(config)
    return model.to(torch.bfloat16).eval()


def test_a_compiled_model(target: str) -> None:
    plain, fused = (
        qcompiler.compile(llama(), example_kwargs={"input_ids": IDS, "use_cache": False}, target=name, progress=False)
        for name in ("cpu", target)
    )
    passes = HOPPER.passes.split("; ")
    assert list(fused.stages)[-len(passes) :] == passes
    assert "fuse-pointwise" not in plain.stages and fused.graph.ops("kernel.pointwise")
    assert str(fused.pipeline) == f"{plain.pipeline}; {HOPPER.passes}"
    assert torch.equal(fused(input_ids=IDS, use_cache=False).logits, plain(input_ids=IDS, use_cache=False).logits)


def test_passes_that_the_caller_gave_run_as_they_are(target: str) -> None:
    model = torch.nn.Linear(128, 128).eval()
    own = qcompiler.compile(
        model, pipeline="canonicalize; fp8-tile", example_inputs=(torch.ones(3, 128),), target=target
    )
    assert list(own.stages)[1:] == ["canonicalize", "fp8-tile"]


def test_decoders(target: str) -> None:
    made = [qcompiler.decoder(llama(), kv_cache="fp8", max_batch=2, max_length=32, target="cpu", progress=False)]
    made.append(qcompiler.decoder(llama(), kv_cache="fp8", max_batch=2, max_length=32, target=target, progress=False))
    example = {"input_ids": IDS, "position_ids": torch.arange(7)[None], "use_cache": False}
    compiled = qcompiler.compile(llama(), example_kwargs=example, target=target, progress=False)
    made.append(compiled.decoder(kv_cache="fp8", max_batch=2, max_length=32))
    answers = [each.generate([[5, 9, 31], [7, 7]], max_new_tokens=8, ignore_eos=True) for each in made]
    assert answers[0] == answers[1] == answers[2]
    passes = HOPPER.passes.split("; ")
    for each in made[1:]:
        assert list(each.stages)[-len(passes) :] == passes
        assert not {*passes} & {*list(each.stages)[: -len(passes)]}, "the passes of the target run once"
        for name in ("fused_append", "fused_attend"):
            assert len(each.graph.ops(f"state.{name}")) == 1 and f"kernels.{name}(" in each.source
