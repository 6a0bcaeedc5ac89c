"""Sharded models on the command line: compiled one rank after the other, and run with all ranks in one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import qcompiler
from qcompiler.cli import main
from qcompiler.cli.meshes import load_artefact

AUTO: Any = AutoModelForCausalLM  # without types
TWO = qcompiler.simulated_mesh(tp=2)
CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4,
    head_dim=64, vocab_size=96, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded")
    torch.manual_seed(0)
    AUTO.from_config(CONFIG).save_pretrained(path / "checkpoint")
    return path


@pytest.fixture(scope="module")
def artefact(folder: Path) -> Path:
    assert main(["compile", str(folder / "checkpoint"), "--mesh", "tp=2", "-o", str(folder / "artefact")]) == 0
    return folder / "artefact"


def test_compile_writes_what_the_library_writes(folder: Path, artefact: Path) -> None:
    ids = AUTO.from_config(CONFIG).dummy_inputs["input_ids"]
    wanted = qcompiler.compile(folder / "checkpoint", mesh=TWO, example_kwargs={"input_ids": ids})
    found = load_artefact(artefact)
    for one, two in zip(found.ranks, wanted.ranks, strict=True):
        assert str(one.graph) == str(two.graph)
        for a, b in zip(one.weights.buffers(), two.weights.buffers(), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert torch.equal(found(ids).logits, wanted(ids).logits)


def test_commands_on_an_artefact(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(artefact)]) == 0
    assert "fp8_tile for cpu on 2 ranks (tp=2), by qcompiler" in capsys.readouterr().out
    assert main(["inspect", str(artefact), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["artefact"]["mesh"] == "tp=2"
    assert main(["bench", str(artefact), "--rows", "1", "--repeats", "1", "--quiet"]) == 0
    assert main(["report", str(artefact)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "tp"], "mesh"),
        (["--mesh", "tp=3"], "cannot be cut into 3 equal parts"),
        (["--sharding", "tp"], "--sharding needs a mesh: got --sharding tp; need --mesh tp=2 as well"),
        (["--mesh", "tp=2", "--sharding", "xp"], "no such tactic: got 'xp'"),
        (["--mesh", "tp=2", "--checkpoint", "fp8=x"], "a sharded model is saved as an artefact only"),
    ],
)
def test_refusals(arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "refused"
    assert main(["compile", str(folder / "checkpoint"), "-o", str(output), *arguments]) != 0
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_a_checkpoint_of_a_sharded_model(folder: Path, artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, output = str(folder / "checkpoint"), str(folder / "fp8")
    assert main(["export", str(artefact), "--to", "fp8", "--model", model, "-o", output]) != 0
    assert "a sharded model cannot be saved as a checkpoint" in capsys.readouterr().err
