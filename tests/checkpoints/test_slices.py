"""Parts of weights in files: equal to parts of the loaded weights, and nothing else is read."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

import qcompiler
from qcompiler.capture.stand_ins import stand_in
from qcompiler.capture.stored_weights import notes_of
from qcompiler.checkpoints import load_model, read, write
from qcompiler.checkpoints.files import TensorFiles
from qcompiler.checkpoints.loading import load_in_slices
from qcompiler.checkpoints.slices import Slices

AUTO: Any = AutoModelForCausalLM  # without types
CPU = torch.device("cpu")
IDS = torch.arange(24).reshape(2, 12) * 7 % 96
CALL = {"input_ids": IDS, "use_cache": False}
SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "vocab_size": 96, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA = LlamaConfig(**SIZES, intermediate_size=256, tie_word_embeddings=False)
TIED = LlamaConfig(**SIZES, intermediate_size=256, tie_word_embeddings=True)
MIXTRAL = MixtralConfig(**SIZES, intermediate_size=32, num_local_experts=4)
QWEN3 = Qwen3MoeConfig(**SIZES, moe_intermediate_size=128, intermediate_size=64, num_experts=4, num_experts_per_tok=2)


def saved(folder: Path, config: PretrainedConfig, kind: Any = AUTO, dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(0)
    model = kind.from_config(config) if kind is AUTO else kind(config)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Name of a tensor -> bytes that were read of it."""
    found: Counter[str] = Counter()
    whole, part = TensorFiles.__getitem__, TensorFiles.part

    def counted(tensor: torch.Tensor, name: str) -> torch.Tensor:
        found[name] += 0 if tensor.is_meta else tensor.nbytes
        return tensor

    monkeypatch.setattr(TensorFiles, "__getitem__", lambda self, name: counted(whole(self, name), name))
    monkeypatch.setattr(TensorFiles, "part", lambda self, name, ranges: counted(part(self, name, ranges), name))
    return found


def sources_in(folder: Path) -> dict[str, Slices]:
    return load_in_slices(folder, CPU).__dict__["_qcompiler_sources"]  # type: ignore[no-any-return]


def vision(size: int) -> Any:
    text = {**SIZES, "moe_intermediate_size": size, "num_experts": 3, "num_experts_per_tok": 2}
    sizes = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
    return Qwen3VLMoeConfig(text_config=text, vision_config={**sizes, "deepstack_visual_indexes": []})


@pytest.mark.parametrize(
    ("config", "kind"),
    [(TIED, AUTO), (MIXTRAL, AUTO), (QWEN3, AUTO), (vision(48), Qwen3VLMoeForConditionalGeneration)],
    ids=["tied", "mixtral", "qwen3", "transposed"],
)
def test_parts_are_parts_of_the_loaded_weights(config: Any, kind: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, config, kind)
    state, sources = load_model(folder).state_dict(), sources_in(folder)
    matrices = {name for name, tensor in state.items() if tensor.dim() > 1}
    assert {*sources} == matrices - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    for name, source in sources.items():
        assert torch.equal(source(), state[name]), name
        for axis, size in enumerate(source.shape):
            start, length = size // 3, max(size // 2, 1)
            part = source.part(axis, start, length)
            assert torch.equal(part(), state[name].narrow(axis, start, length)), name
            again = part.part(-1 % len(source.shape), 1, 2)
            assert torch.equal(again(), state[name].narrow(axis, start, length).narrow(-1, 1, 2)), name


def test_element_types_are_the_ones_of_the_model(tmp_path: Path) -> None:
    folder = saved(tmp_path, LLAMA, dtype=torch.float32)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    state = load_model(folder).state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert all(torch.equal(source(), state[name]) for name, source in sources_in(folder).items())
    config.write_text(config.read_text().replace('"dtype": "bfloat16",', ""))
    models: list[Any] = [load_in_slices(folder, CPU), load_model(folder)]
    assert [model.dtype for model in models] == [torch.float32] * 2


def test_two_tensors_of_a_tied_weight_are_compared(tmp_path: Path) -> None:
    """Equal ones are tied, as in `load_model`; each rank reads them whole, and the report says so."""
    folder = saved(tmp_path, TIED)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert not sources_in(folder).keys() & {"lm_head.weight", "model.embed_tokens.weight"}
    model: Any = load_in_slices(folder, CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    (note,) = notes_of(model)
    assert note.startswith("each rank reads 2 matrices of the checkpoint whole, such as 'lm_head.weight'")


def test_a_square_stack_that_may_be_transposed_is_read_whole(tmp_path: Path) -> None:
    folder = saved(tmp_path, vision(64), Qwen3VLMoeForConditionalGeneration)
    (name,) = (name for name in load_model(folder).state_dict() if name.endswith("experts.down_proj"))
    assert name not in sources_in(folder)
    assert torch.equal(load_in_slices(folder, CPU).state_dict()[name], load_model(folder).state_dict()[name])


def test_a_weight_without_values() -> None:
    with pytest.raises(qcompiler.QCompilerError, match="a weight of the model has no values: got weight"):
        stand_in(torch.nn.Linear(4, 4, bias=False, device="meta"), {}, CPU)


def test_stand_ins_share_memory(tmp_path: Path) -> None:
    model: Any = load_in_slices(saved(tmp_path, TIED), CPU)
    matrices = [tensor for tensor in model.parameters() if tensor.dim() > 1]
    assert len({tensor.untyped_storage().data_ptr() for tensor in matrices}) == 1
    assert len({tensor.data_ptr() for tensor in matrices}) == len(matrices)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.norm.weight.untyped_storage().data_ptr() != matrices[0].untyped_storage().data_ptr()


def equal_ranks(found: Any, wanted: Any) -> bool:
    """Whether all ranks of two models have equal programs and weights."""
    return all(
        str(one.graph) == str(two.graph)
        and one.graph.weights.keys() == two.graph.weights.keys()
        and all(
            torch.equal(one.graph.weights[name].view(torch.uint8), two.graph.weights[name].view(torch.uint8))
            for name in one.graph.weights
        )
        for one, two in zip(found.ranks, wanted.ranks, strict=True)
    )


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture with codes and scales in the files, one matrix for each expert."""
    folder = saved(tmp_path_factory.mktemp("float"), QWEN3)
    compiled = qcompiler.compile(folder, scheme="fp8_tile", example_kwargs=CALL)
    write(compiled, folder / "fp8", "fp8", model=load_model(folder), reader=None)
    return folder / "fp8"


@pytest.mark.parametrize(
    ("config", "sharding"), [(LLAMA, "tp"), (MIXTRAL, "tp; ep"), (None, "tp; ep")], ids=["llama", "mixtral", "fp8"]
)
def test_ranks_of_a_folder(config: Any, sharding: str, fp8: Path, tmp_path: Path, log: Counter[str]) -> None:
    """Both ranks together read each matrix once: each its own part, or a shared one that both hold."""
    folder = fp8 if config is None else saved(tmp_path, config)
    mesh = qcompiler.simulated_mesh(tp=2)
    wanted = qcompiler.compile(load_model(folder), mesh=mesh, sharding=sharding, example_kwargs=CALL)
    log.clear()
    found = qcompiler.compile(folder, mesh=mesh, sharding=sharding, example_kwargs=CALL)
    assert equal_ranks(found, wanted)
    assert "shard(axis = 1" in str(found.stages["shard"])
    assert ("coll.own_first" in str(found.graph)) == (sharding != "tp")
    checkpoint, counted = read(folder), dict(log)
    sizes = {name: tensor.nbytes for name, tensor in checkpoint.tensors.items() if name not in checkpoint.beside}
    assert {name: counted[name] for name in sizes} == sizes


def test_a_code_that_is_not_finite_is_found(fp8: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(fp8, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"].view(torch.uint8)[3, 5] = 0x7F
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(qcompiler.QCompilerError, match=r"a code of a quantized weight is not a number: got nan at"):
        qcompiler.compile(folder, mesh=qcompiler.simulated_mesh(tp=2), example_kwargs=CALL)
