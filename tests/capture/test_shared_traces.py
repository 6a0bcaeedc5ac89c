"""What `shared_traces` shares between tests, and that neither it nor torch's cache changes a captured graph."""

from collections.abc import Callable
from typing import Any

import pytest
import shared_traces
import torch
from decoding_models import COMMON, tiny
from transformers import LlamaConfig

from qcompiler.capture import capture, capturing, exporting
from qcompiler.capture.stored_weights import Stored, hold
from qcompiler.interpreter import interpret
from qcompiler.ir.formats import FP8_ROW

CALL = {"input_ids": torch.arange(18).reshape(2, 9) % 64}


def llama(seed: int = 0, **changes: Any) -> Any:
    changes = {"num_hidden_layers": 1, "intermediate_size": 64, "num_key_value_heads": 2, **changes}
    return tiny(LlamaConfig(**{**COMMON, **changes}), seed)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that were traced rather than found."""
    seen: list[Any] = []

    def export(model: Any, *rest: Any, real: Callable[..., Any] = exporting.export_program) -> Any:
        seen.append(model)
        return real(model, *rest)

    monkeypatch.setattr(shared_traces, "_programs", {})
    monkeypatch.setattr(capturing, "export_program", shared_traces.shared(export))
    return seen


def test_a_shared_trace_gives_the_same_graph_with_the_weights_of_each_model(traced: list[Any]) -> None:
    one, other = llama(0), llama(1)
    first, second = (capture(model, kwargs=CALL).graph for model in (one, other))
    assert traced == [one]
    assert str(first) == str(second)
    for model, graph in ((one, first), (other, second)):
        assert graph.weights["lm_head.weight"].data_ptr() == model.lm_head.weight.data_ptr()
        with torch.no_grad():
            want = model(**CALL).logits
        torch.testing.assert_close(interpret(graph, [CALL["input_ids"]])[0], want, rtol=1e-5, atol=1e-5)
    shared_traces._programs.clear()
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=True):  # as for users; tests switch it off
        assert str(capture(llama(1), kwargs=CALL).graph) == str(first)
    assert len(traced) == 2


def scaled(model: Any) -> None:
    model.model.layers[0].self_attn.scaling = 0.5


def hooked(model: Any) -> None:
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * 2,))


def patched(model: Any) -> None:
    model.lm_head.forward = lambda x: x


def untied(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


def in_bf16(model: Any) -> None:
    model.model.norm.bfloat16()


def of_stored_weights(model: Any) -> None:
    hold(model.lm_head, {"weight": Stored("scale", FP8_ROW, torch.float32)})


@pytest.mark.parametrize("change", [of_stored_weights, scaled, hooked, patched, untied, in_bf16])
def test_a_changed_model_is_another_trace_or_is_always_traced(change: Callable[[Any], None]) -> None:
    model, same = (llama(tie_word_embeddings=True) for _ in range(2))
    before = shared_traces._key(model, (), CALL)
    assert before is not None and before == shared_traces._key(same, (), CALL)
    change(model)
    assert shared_traces._key(model, (), CALL) != before
    never = shared_traces._key(model, (), CALL) is None
    assert never == (change in (hooked, patched, of_stored_weights))


def test_other_calls_and_other_models_are_other_traces() -> None:
    model, ids = llama(), CALL["input_ids"]
    calls: list[dict[str, Any]] = [
        CALL, {"input_ids": ids[:1]}, {"input_ids": ids.int()}, {"input_ids": ids, "use_cache": False},
        {"input_ids": ids, "position_ids": ids}, {"input_ids": ids, "position_ids": ids.clone()},
    ]  # fmt: skip
    keys = [shared_traces._key(model, (), call) for call in calls]
    keys.append(shared_traces._key(llama(rope_theta=5.0), (), CALL))
    assert None not in keys and len({*keys}) == len(keys)
    assert shared_traces._key(torch.nn.Linear(9, 9), (ids,), {}) is None
