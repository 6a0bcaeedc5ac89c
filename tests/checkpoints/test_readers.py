"""Checkpoints that transformers or vLLM cannot read are refused: which layers, which readers, what helps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import qcompiler
from qcompiler import QCompilerError, numerics
from qcompiler.checkpoints.format import writer_called
from qcompiler.checkpoints.quantized_weight import QuantizedWeight
from qcompiler.checkpoints.readers import Written, check_reader

AUTO: Any = AutoModelForCausalLM  # without types
IDS = torch.arange(12).reshape(1, 12)


def weight(rows: int, columns: int, block: tuple[int, int] = (128, 128)) -> QuantizedWeight:
    format = numerics.format_of(block)
    codes, scale = numerics.quantize(torch.ones(rows, columns), format)
    return QuantizedWeight(codes, scale, format)


def refused(
    format: str, weights: dict[str, QuantizedWeight], reader: str = "any", plain: set[str] | None = None,
    named: set[str] | None = None,
) -> str | None:  # fmt: skip
    """The message of the error, if there is one."""
    try:
        check_reader(reader, Written(writer_called(format, "float"), weights, plain or set(), named or set()))
    except QCompilerError as error:
        return str(error)
    return None


@pytest.mark.parametrize("format", ["fp8", "compressed-tensors"])
def test_what_all_readers_read(format: str) -> None:
    assert refused(format, {"a.weight": weight(128, 256), "b.weight": weight(384, 128)}) is None
    assert refused(format, {}) is None
    assert (
        refused("compressed-tensors", {"a.weight": weight(200, 72, (1, -1)), "b.weight": weight(7, 9, (-1, -1))})
        is None
    )


def test_the_error_names_layers_readers_and_what_helps() -> None:
    weights = {f"m.{i}.q.weight": weight(192, 128) for i in range(3)} | {"m.0.k.weight": weight(128, 128)}
    assert refused("fp8", weights) == (
        "other tools cannot read 3 of 4 quantized layers, or would change them:\n"
        "  m.*.q [192, 128]: vLLM refuses or misreads sizes that are not multiples of the block [128, 128] where it "
        "merges layers, such as q, k and v, and where it splits them across GPUs\n"
        "  m.*.q [192, 128]: transformers without a GPU derives the block size from the shapes, and misreads or "
        'refuses them. Leave them in float, overrides={"m.*.q": None}; or: scheme="fp8_row" and '
        'format="compressed-tensors" have no blocks; or pass reader=None to write the checkpoint regardless.'
    )
    only = refused("fp8", weights, "vllm")
    assert only is not None and only.startswith("vLLM cannot read 3 of 4") and "transformers" not in only


def test_no_reader_and_an_unknown_one() -> None:
    check_reader(None, Written(writer_called("fp8", "float"), {"a.weight": weight(192, 128)}))
    assert str(refused("fp8", {}, "vlm")).startswith("no such reader of checkpoints: got 'vlm'. Did you mean 'vllm'?")


@pytest.mark.parametrize(
    ("format", "sizes", "fails"),
    [
        ("fp8", (64, 128), False), ("fp8", (128, 64), False), ("fp8", (192, 128), True), ("fp8", (128, 192), True),
        ("compressed-tensors", (192, 128), False), ("compressed-tensors", (128, 192), True),
        ("compressed-tensors", (128, 64), True),
    ],
)  # fmt: skip
def test_transformers_is_named_where_it_fails(format: str, sizes: tuple[int, int], fails: bool) -> None:
    assert (refused(format, {"a.weight": weight(*sizes)}, "transformers") is not None) is fails
    assert "vLLM" in str(refused(format, {"a.weight": weight(*sizes)}))


def test_layers_that_are_quantized_only_when_named() -> None:
    weights = {"lm_head.weight": weight(256, 128), "up.weight": weight(128, 128)}
    text = refused("fp8", weights, named={"lm_head.weight", "x"})
    assert text is not None and text.startswith("other tools cannot read 1 of 2 quantized layers")
    assert "  lm_head [256, 128]: vLLM builds most routers" in text and 'overrides={"lm_head": None}' in text
    assert refused("fp8", weights, "transformers", named={"lm_head.weight"}) is None


def test_layers_that_vllm_merges_with_layers_in_float() -> None:
    weights = {"m.q_proj.weight": weight(128, 128), "m.gate_proj.weight": weight(128, 128)}
    text = refused("fp8", weights, plain={"m.k_proj", "m.v_proj", "other.up_proj"})
    assert text is not None and "  m.q_proj [128, 128]: vLLM merges them with layers that are not quantized" in text
    assert "gate_proj" not in text, "its partner is in another module"
    assert refused("fp8", weights, "transformers", plain={"m.k_proj"}) is None


def test_scales_that_vllm_replaces_by_the_largest() -> None:
    same = {f"m.{part}_proj.weight": weight(128, 128, (-1, -1)) for part in "qkv"}
    assert refused("compressed-tensors", same) is None
    codes, scale = numerics.quantize(torch.full((128, 128), 3.0), numerics.format_of((-1, -1)))
    other = same | {"m.k_proj.weight": QuantizedWeight(codes, scale, numerics.format_of((-1, -1)))}
    text = refused("compressed-tensors", other)
    assert text is not None and "quantizes them again with the largest of their scales" in text
    assert "m.q_proj" in text and 'scheme="fp8_row" has scales that it does not change' in text


def test_int8_scales_of_merged_tensors_stay_in_vllm() -> None:
    def integers(size: float, x_scale: float | None = None) -> QuantizedWeight:
        format = numerics.format_of((-1, -1), torch.int8)
        codes, scale = numerics.quantize(torch.full((128, 128), size), format)
        return QuantizedWeight(codes, scale, format, x_scale=None if x_scale is None else torch.tensor([x_scale]))

    assert (
        refused("compressed-tensors", {"m.gate_proj.weight": integers(1.0), "m.up_proj.weight": integers(2.0)}) is None
    )
    same = {"m.gate_proj.weight": integers(1.0, 0.5), "m.up_proj.weight": integers(2.0, 0.5)}
    assert refused("compressed-tensors", same) is None
    text = refused("compressed-tensors", same | {"m.up_proj.weight": integers(2.0, 0.25)})
    assert text is not None and "uses the largest of their static activation scales for all" in text


def test_many_kinds_are_cut_short() -> None:
    text = str(refused("fp8", {f"part{chr(97 + i)}.weight": weight(192, 128) for i in range(12)}))
    assert "; and 4 more kinds: vLLM" in text and '"parth": None, …}' in text


def llama(hidden: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=128, pad_token_id=0,
    )  # fmt: skip
    return AUTO.from_config(config, dtype=torch.bfloat16).eval()


def test_a_ragged_model_is_refused_or_written_regardless(tmp_path: Path) -> None:
    model = llama(192)
    fast = qcompiler.compile(model, example_inputs=(IDS,))
    for format in ("fp8", "compressed-tensors"):
        with pytest.raises(QCompilerError, match="other tools cannot read 7 of 7 quantized layers"):
            fast.save_checkpoint(tmp_path / format, format)
        assert not (tmp_path / format).exists()
        fast.save_checkpoint(tmp_path / format, format, reader=None)
        assert (tmp_path / format / "config.json").exists()
    with pytest.raises(RuntimeError, match="unflatten"):  # what the error prevents
        AUTO.from_pretrained(tmp_path / "compressed-tensors", dtype=torch.bfloat16)(IDS)


@torch.no_grad()
def test_a_named_head_is_read_by_transformers_but_not_by_vllm(tmp_path: Path) -> None:
    model = llama(128)
    fast = qcompiler.compile(model, example_inputs=(IDS,), overrides={"lm_head": "fp8_tile"})
    with pytest.raises(QCompilerError, match=r"vLLM cannot read 1 of 8 .*\n  lm_head \[128, 128\]: vLLM builds"):
        fast.save_checkpoint(tmp_path / "out", "fp8", reader="vllm")
    fast.save_checkpoint(tmp_path / "out", "fp8", reader="transformers")
    exact, read = model(IDS).logits, AUTO.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)(IDS).logits
    assert float((read - exact).float().norm() / exact.float().norm()) < 0.1


@torch.no_grad()
def test_a_partly_quantized_model(tmp_path: Path) -> None:
    model = llama(128)
    fast = qcompiler.compile(model, example_inputs=(IDS,), overrides={"*.k_proj": None, "*.up_proj": None})
    with pytest.raises(QCompilerError, match="cannot read 3 of 5 quantized layers") as caught:
        fast.save_checkpoint(tmp_path / "out", "fp8")
    assert str(caught.value).count("\n") == 1 and "q_proj" in str(caught.value) and "gate_proj" in str(caught.value)
    fast.save_checkpoint(tmp_path / "out", "fp8", reader="transformers")
    exact, read = model(IDS).logits, AUTO.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)(IDS).logits
    assert float((read - exact).float().norm() / exact.float().norm()) < 0.1
