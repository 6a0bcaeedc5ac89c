"""Warnings of checkpoints that transformers or vLLM cannot read: which layers, which readers, what helps."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import qcompiler
from qcompiler import CheckpointWarning, numerics
from qcompiler.checkpoints.format import writer_called
from qcompiler.checkpoints.quantized_weight import QuantizedWeight
from qcompiler.checkpoints.readers import warn
from qcompiler.cli import command_line

AUTO: Any = AutoModelForCausalLM  # without types
IDS = torch.arange(12).reshape(1, 12)


def weight(rows: int, columns: int, block: tuple[int, int] = (128, 128)) -> QuantizedWeight:
    format = numerics.format_of(block)
    codes, scale = numerics.quantize(torch.ones(rows, columns), format)
    return QuantizedWeight(codes, scale, format)


def said(format: str, weights: dict[str, QuantizedWeight], skipped: set[str] | None = None) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn(writer_called(format, "float"), weights, skipped or set(), stacklevel=1)
    assert all(each.category is CheckpointWarning for each in caught)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("format", ["fp8", "compressed-tensors"])
def test_what_all_readers_read_is_no_matter_for_a_warning(format: str) -> None:
    assert said(format, {"a.weight": weight(128, 256), "b.weight": weight(384, 128)}) == []
    assert said(format, {}) == []
    assert said("compressed-tensors", {"a.weight": weight(200, 72, (1, -1)), "b.weight": weight(7, 9, (-1, -1))}) == []


def test_the_warning_names_layers_readers_and_what_helps() -> None:
    weights = {f"m.{i}.q.weight": weight(192, 128) for i in range(3)} | {"m.0.k.weight": weight(128, 128)}
    assert said("fp8", weights) == [
        "3 of 4 quantized layers in this checkpoint have sizes that are not multiples of their block [128, 128]: "
        "m.*.q [192, 128]. vLLM refuses or misreads them where it merges layers, such as q, k and v, and where it "
        "splits them across GPUs. transformers without a GPU derives the block size from the shapes, and misreads or "
        'refuses them. Leave them in float, overrides={"m.*.q": None}, or compile with scheme="fp8_row" and write the '
        'format "compressed-tensors", which then has no blocks.'
    ]


@pytest.mark.parametrize(
    ("format", "sizes", "fails"),
    [
        ("fp8", (64, 128), False), ("fp8", (128, 64), False), ("fp8", (192, 128), True), ("fp8", (128, 192), True),
        ("compressed-tensors", (192, 128), False), ("compressed-tensors", (128, 192), True),
        ("compressed-tensors", (128, 64), True),
    ],
)  # fmt: skip
def test_transformers_is_named_where_it_fails(format: str, sizes: tuple[int, int], fails: bool) -> None:
    (text,) = said(format, {"a.weight": weight(*sizes)})
    assert ("transformers" in text) is fails and "vLLM" in text


def test_layers_that_are_quantized_only_when_named() -> None:
    (text,) = said("fp8", {"lm_head.weight": weight(256, 128), "up.weight": weight(128, 128)}, {"lm_head.weight", "x"})
    assert text.startswith(
        "1 of 2 quantized layers in this checkpoint are routers, vocabulary projections or tiny: lm_h"
    )
    assert text.endswith('no place for their scales. Leave them in float, overrides={"lm_head": None}.')


def test_many_kinds_are_cut_short() -> None:
    (text,) = said("fp8", {f"part{chr(97 + i)}.weight": weight(192, 128) for i in range(12)})
    assert "; and 4 more kinds. " in text and 'overrides={"parta": None, ...}' in text


def llama(hidden: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=128, pad_token_id=0,
    )  # fmt: skip
    return AUTO.from_config(config, dtype=torch.bfloat16).eval()


def test_a_ragged_model_is_written_with_a_warning_at_the_callers_line(tmp_path: Path) -> None:
    model = llama(192)
    fast = qcompiler.compile(model, example_inputs=(IDS,))
    for format in ("fp8", "compressed-tensors"):
        with pytest.warns(CheckpointWarning, match="7 of 7 quantized layers") as caught:
            fast.save_checkpoint(tmp_path / format, format)
        assert [each.filename for each in caught] == [__file__] and (tmp_path / format / "config.json").exists()
    with pytest.raises(RuntimeError, match="unflatten"):  # what the warning is about
        AUTO.from_pretrained(tmp_path / "compressed-tensors", dtype=torch.bfloat16)(IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        with pytest.raises(CheckpointWarning):
            fast.save_checkpoint(tmp_path / "none", "fp8")
    assert not (tmp_path / "none").exists()


@torch.no_grad()
def test_a_named_head_is_written_and_read_by_transformers(tmp_path: Path) -> None:
    model = llama(128)
    fast = qcompiler.compile(model, example_inputs=(IDS,), overrides={"lm_head": "fp8_tile"})
    with pytest.warns(
        CheckpointWarning, match=r"1 of 8 quantized layers .* vocabulary projections .* lm_head \[128, 128\]"
    ):
        fast.save_checkpoint(tmp_path / "out", "fp8")
    exact, read = model(IDS).logits, AUTO.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)(IDS).logits
    assert float((read - exact).float().norm() / exact.float().norm()) < 0.1


def test_the_command_line_prints_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with command_line._warnings_as_lines():
        warn(writer_called("fp8", "float"), {"a.weight": weight(192, 128)}, set(), stacklevel=1)
        print("out has it")
    captured = capsys.readouterr()
    assert captured.out == "out has it\n"
    assert captured.err.startswith("warning: 1 of 1 quantized layers in this checkpoint have sizes that are not")
    with command_line._warnings_as_lines(), pytest.warns(DeprecationWarning, match="another's"):
        warnings.warn("another's", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == ""
