"""Sharded models in folders: ranks that read their slices of a checkpoint, and artefacts with the weights of ranks."""

import gc
import json
import shutil
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import run_on_two_ranks
from sharded_graphs import MLP_INPUT as X
from sharded_graphs import mlp
from transformers import AutoModelForCausalLM, LlamaConfig

import qcompiler
from qcompiler.artefact.checking import check
from qcompiler.artefact.saving import write_weights
from qcompiler.artefact.weight_files import Plan

AUTO: Any = AutoModelForCausalLM  # without types
TWO = qcompiler.simulated_mesh(tp=2)
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 96, "tie_word_embeddings": False,
}  # fmt: skip


@cache
def compiled() -> Any:
    return qcompiler.compile(mlp(), mesh=TWO)


def save(folder: Path) -> Path:
    compiled().save(folder / "model")
    return folder / "model"


def same_bits(one: Any, two: Any) -> bool:
    """Whether two compiled models have equal weights."""
    pairs = zip(one.weights.buffers(), two.weights.buffers(), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def test_an_artefact_of_all_ranks(tmp_path: Path) -> None:
    folder = save(tmp_path)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.glob("**/*.safetensors"))
    assert names == ["rank-00000/weights.safetensors", "rank-00001/weights.safetensors"]
    loaded = qcompiler.load(folder, mesh=TWO, verify=True)
    assert torch.equal(loaded(X), compiled()(X))
    assert all(same_bits(one, two) for one, two in zip(loaded.ranks, compiled().ranks, strict=True))
    assert check(folder).ok
    assert str(loaded.report) == str(compiled().report)
    loaded.save(folder)  # replaces what it was loaded from
    assert torch.equal(qcompiler.load(folder, mesh=TWO)(X), compiled()(X))
    with pytest.raises(qcompiler.QCompilerError, match="one rank of a simulation cannot be saved"):
        loaded.ranks[1].save(tmp_path / "one")


def test_weights_of_a_rank_in_several_files(tmp_path: Path) -> None:
    compiled().save(tmp_path / "model", shard_bytes=1)
    assert (tmp_path / "model/rank-00001/weights-00002-of-00004.safetensors").is_file()
    assert torch.equal(qcompiler.load(tmp_path / "model", mesh=TWO)(X), compiled()(X))


def test_ranks_are_written_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight of an earlier rank is in memory when the next one is written, and all ranks are as usual."""
    torch.manual_seed(0)
    AUTO.from_config(LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
    call: dict[str, Any] = {"input_ids": torch.arange(24).reshape(2, 12), "use_cache": False}
    pending: Any = qcompiler.compile(tmp_path / "checkpoint", mesh=TWO)
    written: list[list[weakref.ref[torch.Tensor]]] = []

    def write(work: Path, plan: Plan, *rest: Any) -> list[str]:
        gc.collect()
        assert not any(each() is not None for each in (written[-1] if written else ()))
        written.append([weakref.ref(each) for shard in plan.shards for each in shard.values() if each.dim() > 1])
        return write_weights(work, plan, *rest)

    monkeypatch.setattr("qcompiler.artefact.sharded_saving.write_weights", write)
    program = pending.compile_into(tmp_path / "model", ((), call))
    assert len(written) == 2 and not program.graph.weights
    wanted: Any = qcompiler.compile(tmp_path / "checkpoint", mesh=TWO, example_kwargs=call)
    found = qcompiler.load(tmp_path / "model", mesh=TWO)
    assert all(same_bits(one, two) for one, two in zip(found.ranks, wanted.ranks, strict=True))
    assert torch.equal(found(**call).logits, wanted(**call).logits)


def test_wrong_meshes(tmp_path: Path) -> None:
    folder = save(tmp_path)
    with pytest.raises(qcompiler.ArtefactError, match="the artefact needs a mesh: got a model for 2 ranks; need tp=2"):
        qcompiler.load(folder)
    with pytest.raises(qcompiler.ArtefactError, match="the artefact is for another mesh: got tp=4; need tp=2"):
        qcompiler.load(folder, mesh=qcompiler.simulated_mesh(tp=4))
    qcompiler.compile(mlp()).save(tmp_path / "whole")
    with pytest.raises(qcompiler.ArtefactError, match="the artefact is not for a mesh: got the mesh tp=2"):
        qcompiler.load(tmp_path / "whole", mesh=TWO)
    with pytest.raises(qcompiler.PassError, match="the mesh is of a wrong type"):
        qcompiler.load(folder, mesh="tp=2")  # type: ignore[arg-type]


def test_damaged_ranks(tmp_path: Path) -> None:
    folder, other = save(tmp_path), save(tmp_path / "other")
    part = "rank-00001/weights.safetensors"
    shutil.copy(other / part, folder / part)
    with pytest.raises(qcompiler.ArtefactError, match=r"a file of weights is from another save: got \w{32}; need \w"):
        qcompiler.load(folder, mesh=TWO)
    assert not check(folder).ok
    (folder / part).unlink()
    with pytest.raises(qcompiler.ArtefactError, match="a file of the artefact is missing"):
        qcompiler.load(folder, mesh=TWO)
    manifest = json.loads((other / "manifest.json").read_text())
    assert manifest["version"] == 2  # so that versions without ranks refuse it
    assert manifest["weights"]["files"] == []


def test_a_save_that_fails_leaves_the_old_artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path)
    before = (folder / "manifest.json").read_bytes()

    def full(work: Path, *_: Any) -> list[str]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qcompiler.artefact.sharded_saving.write_weights", full)
    with pytest.raises(qcompiler.ArtefactError, match="the artefact cannot be saved"):
        compiled().save(folder)
    monkeypatch.undo()
    assert (folder / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_decoders(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AUTO.from_config(LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
    options: dict[str, Any] = {"scheme": None, "max_batch": 2, "max_length": 32, "mesh": TWO}
    wanted = qcompiler.decoder(AUTO.from_pretrained(tmp_path / "checkpoint").eval(), **options)
    decoder = qcompiler.decoder(tmp_path / "checkpoint", **options)
    prompts = [[1, 2, 3], [4]]
    tokens = wanted.generate(prompts, max_new_tokens=4)
    assert decoder.generate(prompts, max_new_tokens=4) == tokens
    decoder.save(tmp_path / "decoder")
    assert qcompiler.load(tmp_path / "decoder", mesh=TWO).generate(prompts, max_new_tokens=4) == tokens


SCRIPT = """
from collections import Counter
from qcompiler.checkpoints.files import TensorFiles
from sharded_graphs import MLP_INPUT as X, mlp

counts = Counter()
whole, part = TensorFiles.__getitem__, TensorFiles.part


def counted(name, tensor):
    counts[name] += 0 if tensor.is_meta else tensor.nbytes
    return tensor


TensorFiles.__getitem__ = lambda self, name: counted(name, whole(self, name))
TensorFiles.part = lambda self, name, ranges: counted(name, part(self, name, ranges))
call = {"input_ids": torch.arange(24).reshape(2, 12), "use_cache": False}
compiled = qcompiler.compile(folder / "checkpoint", mesh=mesh, example_kwargs=call)
found["read"] = dict(counts)
found["weights"] = {name: compiled.graph.weights[name] for name in compiled.graph.weights}

compiled = qcompiler.compile(mlp(), mesh=mesh)
found["output"] = compiled(X)
compiled.save(folder / "together")
found["loaded"] = qcompiler.load(folder / "together", mesh=mesh, verify=True)(X)
found["taken"] = error_of(lambda: compiled.save(folder / "checkpoint"))
found["missing"] = error_of(lambda: qcompiler.load(folder / "broken", mesh=mesh))
found["absent"] = error_of(lambda: qcompiler.load(folder / f"only-{rank}", mesh=mesh))
found["different"] = error_of(lambda: qcompiler.load(folder / f"copy-{rank}", mesh=mesh))
scheme = ["fp8_tile", "fp8_tile{k_block=64}"][rank]
found["programs"] = error_of(lambda: qcompiler.compile(mlp(), scheme=scheme, mesh=mesh))
"""


def test_two_processes(tmp_path: Path) -> None:
    """Each rank reads its parts only, writes and loads its own file, and fails when the other rank fails."""
    torch.manual_seed(0)
    AUTO.from_config(LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
    for name in ("broken", "only-0", "copy-0", "copy-1"):
        compiled().save(tmp_path / name)
    (tmp_path / "broken/rank-00001/weights.safetensors").unlink()
    one, two = run_on_two_ranks(SCRIPT, tmp_path)
    call = {"input_ids": torch.arange(24).reshape(2, 12), "use_cache": False}
    model = AUTO.from_pretrained(tmp_path / "checkpoint").eval()
    sizes = {name: tensor.nbytes for name, tensor in model.state_dict().items()}
    wanted: Any = qcompiler.compile(model, mesh=TWO, example_kwargs=call)
    for found, rank in zip((one, two), wanted.ranks, strict=True):
        assert found["read"] == {name: size // (2 if "_proj" in name else 1) for name, size in sizes.items()}
        assert all(torch.equal(found["weights"][name], rank.graph.weights[name]) for name in rank.graph.weights)
        assert torch.equal(found["output"], compiled()(X))
        assert torch.equal(found["loaded"], found["output"])
    assert torch.equal(qcompiler.load(tmp_path / "together", mesh=TWO)(X), one["output"])
    for step, (first, second) in {
        "taken": ("ArtefactError: the artefact would replace", "QCompilerError: rank 0 has failed: the artefact would"),
        "missing": ("QCompilerError: rank 1 has failed: a file of the", "ArtefactError: a file of the artefact is mis"),
        "absent": ("QCompilerError: rank 1 has failed: there is no", "ArtefactError: there is no artefact: got"),
        "different": ("ArtefactError: the ranks have read different artefacts",) * 2,
        "programs": ("QCompilerError: the ranks have different programs: got 2 programs on 2 ranks",) * 2,
    }.items():
        assert one[step].startswith(first), step
        assert two[step].startswith(second), step
