"""Decoders whose cache has static scales: from calibration, from a checkpoint, and written to one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from decoding_models import llama
from safetensors.torch import load_file, save_file

import qcompiler
from qcompiler.decoding.decoder import Decoder
from qcompiler.errors import PassError
from qcompiler.interpreter import interpret

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": IDS[:, :7]}, {"input_ids": IDS[:, 7:]}]
PROMPTS = [[5, 9, 31], [7, 7]]


def made(model: Any, **options: Any) -> Decoder:
    return qcompiler.decoder(model, max_batch=2, max_length=32, progress=False, **options)


def static_scales(llm: Decoder) -> list[float]:
    weights = llm.graph.weights
    return [float(weights[f"layers.{layer}.{side}_scale"]) for layer in range(2) for side in ("key", "value")]


@pytest.mark.parametrize(("kv_cache", "top"), [("fp8_static", 448.0), ("int8_static", 127.0)])
def test_scales_are_the_largest_magnitudes_of_the_calibration(kv_cache: str, top: float) -> None:
    llm = made(llama(), scheme=None, kv_cache=kv_cache, calibration=DATA)
    largest: dict[str, float] = {}

    def observe(op: Any, _: Any) -> None:
        if op.name == "attention.causal":
            seen.extend((op["key"].name, op["value"].name))

    graph, seen = llm.stages["cache-scales"], list[str]()
    graph.weights = llm.graph.weights
    for call in DATA:
        seen.clear()
        ids = call["input_ids"]

        def keep(op: Any, results: Any) -> None:
            observe(op, results)
            for value, result in zip(op.results, results, strict=True):
                if isinstance(result, torch.Tensor) and result.is_floating_point() and result.numel():
                    largest[value.name] = max(largest.get(value.name, 0.0), float(result.abs().max()))

        interpret(graph, [ids, torch.arange(ids.shape[1]).expand(ids.shape)], observe=keep)
    want = torch.tensor([largest[name] for name in seen]) / top
    torch.testing.assert_close(torch.tensor(static_scales(llm)), want)


def test_artefacts_and_memory(tmp_path: Path) -> None:
    llm = made(llama(), scheme="int8_row", kv_cache="int8_static", calibration=DATA)
    llm.save(tmp_path / "artefact")
    answers = llm.generate(PROMPTS, max_new_tokens=6)
    assert qcompiler.load(tmp_path / "artefact").generate(PROMPTS, max_new_tokens=6) == answers
    assert llm.memory.cache == 2 * 2 * 2 * 32 * 2 * 8, "layers, slots, heads, positions, key and value, size: one byte"


def test_a_checkpoint_gives_and_receives_scales(tmp_path: Path) -> None:
    """Its scales are used as they are, and need no calibration data."""
    model = llama()
    model.save_pretrained(tmp_path / "float")
    llm = made(tmp_path / "float", scheme="fp8_row", kv_cache="fp8_static", calibration=DATA)
    llm.save_checkpoint(tmp_path / "fp8", "compressed-tensors", model=tmp_path / "float")
    scales = load_file(tmp_path / "fp8" / "model.safetensors")
    names = [f"model.layers.{layer}.self_attn.{side}_scale" for layer in range(2) for side in "kv"]
    assert [float(scales[name]) for name in names] == static_scales(llm)
    again = made(tmp_path / "fp8", scheme="fp8_row", kv_cache="fp8_static")
    assert static_scales(again) == static_scales(llm)
    assert again.generate(PROMPTS, max_new_tokens=6) == llm.generate(PROMPTS, max_new_tokens=6)
    (note,) = (note for note in again.report.notes if "cache" in note)
    assert note.endswith('used by a decoder with kv_cache="fp8_static"')
    save_file({**scales, names[0]: torch.tensor([0.5])}, tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    assert static_scales(made(tmp_path / "fp8", scheme="fp8_row", kv_cache="fp8_static"))[0] == 0.5


def test_missing_data_and_missing_scales() -> None:
    with pytest.raises(PassError, match=r"there is no calibration data.*in pass 'cache-scales'"):
        made(llama(), scheme=None, kv_cache="fp8_static")
    compiled = qcompiler.compile(llama(), pipeline="canonicalize", example_inputs=(IDS,), strict=False, progress=False)
    with pytest.raises(PassError, match=r"an attention has no static scales .*got no key_scale.*calibration=batches"):
        compiled.decoder(kv_cache="fp8_static", max_batch=2, max_length=32)
