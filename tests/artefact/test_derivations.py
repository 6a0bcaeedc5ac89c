"""An artefact has all that checkpoints and the HTML page need: a loaded model writes what the saved one does."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompiler
from qcompiler import ArtefactError, CompiledModel, QCompilerError
from qcompiler.artefact.checking import check
from qcompiler.artefact.manifest import sealed

transformers = pytest.importorskip("transformers")

IDS = torch.arange(18).reshape(2, 9)


@pytest.fixture(scope="module")
def model() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def compiled(model: Any) -> CompiledModel:
    return qcompiler.compile(model, example_inputs=(IDS,))


@pytest.fixture(scope="module")
def saved(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    compiled.save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["fp8", "compressed-tensors"])
def test_a_loaded_model_writes_the_same_checkpoint(
    kind: str, model: Any, compiled: CompiledModel, saved: Path, tmp_path: Path
) -> None:
    compiled.save_checkpoint(tmp_path / "first", kind)
    loaded = qcompiler.load(saved)
    loaded.save_checkpoint(tmp_path / "second", kind, model=model)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    loaded.save(tmp_path / "again")
    qcompiler.load(tmp_path / "again").save_checkpoint(tmp_path / "third", kind, model=model)
    assert contents(tmp_path / "first") == contents(tmp_path / "third")


def test_the_model_may_be_a_folder(model: Any, saved: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    qcompiler.load(saved).save_checkpoint(tmp_path / "first", "fp8", model=model)
    qcompiler.load(saved).save_checkpoint(tmp_path / "second", "fp8", model=str(tmp_path / "model"))
    weights = [contents(tmp_path / name)["model.safetensors"] for name in ("first", "second")]
    assert weights[0] == weights[1]


def test_a_smoothed_model(model: Any, tmp_path: Path) -> None:
    """Norms that absorbed factors are found again through two successive derivations."""
    passes = qcompiler.checkpoints.smoothing("smoothquant_o3")
    smooth = qcompiler.compile(model, pipeline=passes, calibration=[IDS], strict=False)
    smooth.save(tmp_path / "artefact")
    smooth.save_checkpoint(tmp_path / "first", "float")
    qcompiler.load(tmp_path / "artefact").save_checkpoint(tmp_path / "second", "float", model=model)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_without_the_model(saved: Path, tmp_path: Path) -> None:
    words = r"the original model no longer exists.*Pass the module or its folder.*model=\.\.\."
    with pytest.raises(QCompilerError, match=words):
        qcompiler.load(saved).save_checkpoint(tmp_path / "checkpoint", "fp8")
    other = torch.nn.Linear(2, 2)
    with pytest.raises(QCompilerError, match="this is not the model that was compiled"):
        qcompiler.load(saved).save_checkpoint(tmp_path / "checkpoint", "fp8", model=other)


def test_derivations_and_reasons_come_back(compiled: CompiledModel, saved: Path) -> None:
    loaded = qcompiler.load(saved)
    had, has = (
        {
            name: (derivation.graph.text(locations=False), derivation.output)
            for name, derivation in each.graph.derivations.items()
        }
        for each in (compiled, loaded)
    )
    assert had == has and len(had) > 6
    assert loaded.skipped == compiled.skipped and any(loaded.skipped.values())


def test_the_page_of_a_loaded_model_says_why(compiled: CompiledModel, saved: Path, tmp_path: Path) -> None:
    for name, each in (("compiled", compiled), ("loaded", qcompiler.load(saved))):
        each.to_html(tmp_path / name)
    pages = [(tmp_path / name).read_text() for name in ("compiled", "loaded")]
    reasons = {why for stage in compiled.skipped.values() for why in stage.values()}
    assert reasons and all(json.dumps(why)[1:-1] in page for why in reasons for page in pages)


# Edited derivations with recomputed hashes


def edit(folder: Path, name: str, change: Callable[[str], str]) -> None:
    path = folder / name
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before
    manifest = json.loads((folder / "manifest.json").read_text())
    data = path.read_bytes()
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))


def derivation(*lines: str, **makes: int) -> Callable[[str], str]:
    """The derivations in place of those of the artefact."""
    return lambda _: json.dumps([{"makes": makes, "graph": ["func @part() -> (f32[2]) {", *lines, "}"]}])


W = '  %w = core.param() {name = "w"} : f32[2]'


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (derivation(W, "  return %w", w=0), "a weight of the artefact depends on itself: got w <- w"),
        (derivation(W, "  return %w", x=1), "got 1; need the number of one of 1 outputs"),
        (derivation(W, "  return %w", x=-1), "got -1; need an integer that is not negative"),
        (derivation("  return %w", x=0), "(?s)a derivation of the artefact cannot be read: .*%w"),
        (
            derivation('  %w = aten.from_file("/etc/hostname", false, 2) : f32[2]', "  return %w", x=0),
            "calls an operator that reads or writes files",
        ),
        (derivation(W, "  return %w", **{"model.norm.weight": 0}), r"need an output that is a tensor.*bf16\[256\]"),
        (lambda text: text.replace("func @part()", "func @part(%x: f32[2])", 1), "a derivation of the artefact has in"),
        (lambda text: json.dumps(json.loads(text) * 2), "need one derivation per weight"),
        (lambda _: "{}", "need a list"),
    ],
)
def test_wrong_derivations(folder: Path, change: Callable[[str], str], says: str) -> None:
    edit(folder, "derivations.json", change)
    with pytest.raises(ArtefactError, match=says) as found:
        qcompiler.load(folder)
    assert "derivations.json" in str(found.value)
    assert not check(folder).ok


def test_a_stage_that_calls_what_it_must_not(folder: Path) -> None:
    """Checkpoints and attribution run parts of stages before the last."""
    name = next(path.name for path in (folder / "stages").iterdir() if path.stem.endswith("fuse-linear"))
    edit(folder, f"stages/{name}", lambda text: text.replace(
        "  return", '  %hidden = aten.from_file("/etc/hostname", false, 4) : f32[4]\n  return', 1))  # fmt: skip
    loaded = qcompiler.load(folder)
    with pytest.raises(ArtefactError, match=rf"an operator that reads or writes files.*{name}"):
        loaded.stages["fuse-linear"]
    assert not check(folder).ok
