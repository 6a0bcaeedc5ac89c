"""Capture of small Hugging Face models with random weights; each graph equals its model at sizes not traced."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from qcompiler.capture import Captured, capture
from qcompiler.errors import CaptureError, InputError
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph

transformers = pytest.importorskip("transformers")
# transformers compiles some losses with torch.jit.script on import, which is deprecated on newer Pythons.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")

SIZE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96}
GROUPED = {**SIZE, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def make(model: str, config: str, **options: Any) -> Any:
    """A model with random weights, in evaluation mode."""
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()


def ids(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 96, (batch, length))}


def masked(batch: int, length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, : length // 3] = 0
    return {**ids(batch, length), "attention_mask": mask}


def pixels(batch: int, _: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 16, 16)}


def mixtral() -> Any:
    model = make("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4, num_experts_per_tok=2)
    model.set_experts_implementation("eager")  # loops over the experts with at least one token
    return model


MODELS: dict[str, tuple[Callable[[], Any], Callable[[int, int], dict[str, torch.Tensor]]]] = {
    "llama": (lambda: make("LlamaForCausalLM", "LlamaConfig", **{**GROUPED, "num_hidden_layers": 2}), ids),
    "qwen3": (lambda: make("Qwen3ForCausalLM", "Qwen3Config", **GROUPED), masked),
    "gemma3": (
        lambda: make(
            "Gemma3ForCausalLM", "Gemma3TextConfig", **{**GROUPED, "num_hidden_layers": 2}, sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        ),
        ids,
    ),
    "gpt2": (
        lambda: make(
            "GPT2LMHeadModel", "GPT2Config", n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=16,
            bos_token_id=1, eos_token_id=2,
        ),
        ids,
    ),
    "opt": (
        lambda: make(
            "OPTForCausalLM", "OPTConfig", hidden_size=64, word_embed_proj_dim=64, ffn_dim=96, num_hidden_layers=1,
            num_attention_heads=4, vocab_size=96, max_position_embeddings=16,
        ),
        masked,
    ),
    "bert": (lambda: make("BertModel", "BertConfig", **SIZE, max_position_embeddings=16), masked),
    "vit": (
        lambda: make(
            "ViTModel", "ViTConfig", hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
            image_size=16, patch_size=8,
        ),
        pixels,
    ),
    "t5": (
        lambda: make(
            "T5EncoderModel", "T5Config", d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, vocab_size=96
        ),
        masked,
    ),
    "mixtral": (mixtral, ids),
}  # fmt: skip


def run(captured: Captured, kwargs: dict[str, Any]) -> Any:
    return captured.signature.unflatten(interpret(captured.graph, captured.signature.flatten((), kwargs)))


@cache
def made(name: str) -> tuple[Any, Captured]:
    """A model and its captured graph, traced with batch 2 and length 7; restores the model's configuration."""
    build, inputs = MODELS[name]
    model = build()
    config, attributes = model.config.to_dict(), set(vars(model))
    captured = capture(model, kwargs=inputs(2, 7))
    assert (model.config.to_dict(), set(vars(model))) == (config, attributes)
    return model, captured


@pytest.mark.parametrize("name", MODELS)
def test_a_model_and_its_graph_agree_at_sizes_not_traced(name: str) -> None:
    model, captured = made(name)
    graph = captured.graph
    graph.verify()
    assert str(Graph.parse(str(graph))) == str(graph)
    files = [op.loc.file for op in graph.ops() if op.loc.file]
    assert files and all(file.startswith("transformers/") for file in files)
    for batch, length in ((3, 9), (1, 1)):
        call = MODELS[name][1](batch, length)
        got = run(captured, call)
        with torch.no_grad():
            want = model(**call, **({"use_cache": False} if "logits" in got else {}))
        assert type(got) is type(want) and list(got) == list(want)
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)


def test_the_graph_of_a_causal_model() -> None:
    graph = made("llama")[1].graph
    assert [str(v.type) for v in graph.inputs] == ["i64[s0, s1]"]
    assert [str(v.type) for v in graph.outputs] == ["f32[s0, s1, 96]"]  # type: ignore[union-attr]  # no cache
    assert len(graph.ops("aten.linear")) == 2 * 7 + 1 and len(graph.ops("aten.scaled_dot_product_attention")) == 2
    heads = [op for op in graph.ops("core.param") if op.attrs.get("role") == "output_embeddings"]
    assert [op.attrs["name"] for op in heads] == ["lm_head.weight"]
    assert any(op.loc.module == "model.layers.1.self_attn.q_proj" for op in graph.ops("aten.linear"))


def test_a_tied_head_uses_the_embedding_weight() -> None:
    weights = made("gpt2")[1].graph.weights
    (name,) = [name for name in weights if "wte" in name or "lm_head" in name]
    assert set(weights.ties[name]) == {"transformer.wte.weight", "lm_head.weight"}  # type: ignore[attr-defined]


# Called `cache` from transformers 5.24 on; all 5.x versions accept this name.
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_a_cache_that_is_passed_is_an_input_and_an_output() -> None:
    model, _ = made("llama")
    with torch.no_grad():
        past = model(**ids(2, 5), use_cache=True).past_key_values
        captured = capture(model, kwargs={**ids(2, 3), "past_key_values": past})
        assert past.get_seq_length() == 5  # the user's cache is not modified
        outputs = [str(v.type) for v in captured.graph.outputs]  # type: ignore[union-attr]
        assert outputs[1] == "f32[s0, 2, s1 + s2, 16]"
        call = {**ids(1, 1), "past_key_values": model(**ids(1, 8), use_cache=True).past_key_values}
        got = run(captured, call)
        want = model(**call)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-5)
    assert got.past_key_values.get_seq_length() == 9


def step(model: Any, cache: Any, batch: int, past: int, new: int) -> dict[str, Any]:
    """A call like those of generate(): a filled cache and a mask over past and new tokens."""
    with torch.no_grad():
        model(**ids(batch, past), past_key_values=cache, use_cache=True)
    mask = torch.ones(batch, past + new, dtype=torch.int64)
    return {**ids(batch, new), "past_key_values": cache, "use_cache": True, "attention_mask": mask}


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("example", [(1, 5, 1), (1, 1, 1), (2, 5, 3)])
def test_a_decode_step_leaves_batch_and_past_and_new_tokens_open(example: tuple[int, int, int]) -> None:
    model, _ = made("llama")
    captured = capture(model, kwargs=step(model, transformers.DynamicCache(), *example))
    inputs = [str(v.type) for v in captured.graph.inputs]
    assert inputs[:2] == ["i64[s0, s1]", "f32[s0, 2, s2, 16]"] and inputs[-1].endswith(", s1 + s2]")
    assert captured.fixed == ()
    for sizes in ((1, 9, 1), (3, 4, 2)):
        call = step(model, transformers.DynamicCache(), *sizes)
        got = run(captured, call)
        with torch.no_grad():
            torch.testing.assert_close(got.logits, model(**call).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_a_static_cache_without_storage_gets_it() -> None:
    model, _ = made("llama")
    cache = transformers.StaticCache(config=model.config, max_cache_len=12)
    captured = capture(model, kwargs={**ids(2, 5), "past_key_values": cache, "use_cache": True})
    assert cache.is_initialized and not cache.get_seq_length() and captured.fixed == ()
    assert str(captured.graph.inputs[1].type) == "f32[s0, 2, 12, 16]"
    for length in (4, 1):
        call = {**ids(2, length), "past_key_values": cache, "use_cache": True}
        got = run(captured, call)
        with torch.no_grad():
            torch.testing.assert_close(got.logits, model(**call).logits, rtol=1e-5, atol=1e-5)
    new = transformers.StaticCache(config=model.config, max_cache_len=12)
    with pytest.raises(InputError, match=r"got .*layers\[0\]\.is_initialized = False; need .*is_initialized = True"):
        run(captured, {**ids(2, 4), "past_key_values": new, "use_cache": True})
    with pytest.raises(InputError, match=r"Allocate it first: cache\.early_initialization\(batch_size, num_heads"):
        run(captured, {**ids(2, 4), "past_key_values": new, "use_cache": True})
    new.early_initialization(3, 2, 16, torch.float32, "cpu")
    with pytest.raises(InputError, match=r"got .*layers\[0\]\.batch_size = 3; need .*layers\[0\]\.batch_size = 2"):
        run(captured, {**ids(3, 4), "past_key_values": new, "use_cache": True})


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_a_cache_that_counts_in_python_is_refused_with_an_alternative() -> None:
    model = make("MistralForCausalLM", "MistralConfig", **GROUPED, sliding_window=4)
    with pytest.raises(CaptureError, match=r"counts its tokens in Python.*past_key_values: got DynamicSlidingWindow"):
        capture(model, kwargs=step(model, transformers.DynamicCache(config=model.config), 2, 5, 1))
    captured = capture(model, kwargs=step(model, transformers.DynamicCache(), 2, 5, 1))
    call = step(model, transformers.DynamicCache(), 1, 9, 1)
    got = run(captured, call)
    with torch.no_grad():
        torch.testing.assert_close(got.logits, model(**call).logits, rtol=1e-5, atol=1e-5)


def test_experts_that_loop_over_data_are_traced_with_another_implementation() -> None:
    model, captured = made("mixtral")
    assert model.get_experts_implementation()[""] == "eager"  # restored
    assert "aten.nonzero" not in {op.name for op in captured.graph}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_the_check_does_not_break_a_cuda_context(name: str) -> None:
    """An index out of range, at a size that the check tries, would make every later call on the GPU fail."""
    build, inputs = MODELS[name]
    model = build().to("cuda", torch.bfloat16)
    captured = capture(model, kwargs={key: t.cuda() for key, t in inputs(2, 7).items()})
    call = {key: t.cuda() for key, t in inputs(1, 5).items()}
    with torch.no_grad():
        want = model(**call, use_cache=False)
    torch.testing.assert_close(run(captured, call)[0], want[0], rtol=2e-2, atol=2e-2)
