"""Decoders: compiled steps over a KV cache give the tokens of transformers' own `generate`."""

import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import decoding_models as models
import pytest
import torch
from transformers import pipeline

import qcompiler
from qcompiler.cli import main
from qcompiler.decoding.decoder import Decoder
from qcompiler.errors import ArtefactError, CaptureError, InputError, PassError, QCompilerError

PROMPTS = [[5, 9, 31], [7, 7], [11, 3, 4, 60, 22, 13, 8], [1], [40, 41, 42, 43]]


def made(model: Any, **options: Any) -> Decoder:
    sizes: dict[str, Any] = {"scheme": None, "max_batch": 3, "max_length": 32, "progress": False}
    return qcompiler.decoder(model, **{**sizes, **options})


def wanted(model: Any, new: int) -> list[list[int]]:
    return models.greedy_tokens(model, PROMPTS, new)


def decoder_of(model: Any) -> tuple[Any, Decoder]:
    return model, made(model)


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Decoder]:
    return decoder_of(models.llama())


@pytest.mark.parametrize("name", models.QUICK)
def test_greedy_tokens_are_those_of_transformers(name: str, request: pytest.FixtureRequest) -> None:
    model, llm = request.getfixturevalue("llama") if name == "llama" else decoder_of(models.MODELS[name]())
    assert llm.generate(PROMPTS, max_new_tokens=12, ignore_eos=True) == wanted(model, 12)


@pytest.mark.matrix
@pytest.mark.parametrize("name", sorted({*models.MODELS} - {*models.QUICK}))
def test_greedy_tokens_are_those_of_transformers_for_more_models(name: str) -> None:
    model = models.MODELS[name]()
    assert made(model).generate(PROMPTS, max_new_tokens=12, ignore_eos=True) == wanted(model, 12)


def test_chunks_of_a_prompt_and_single_rows_change_nothing(llama: tuple[Any, Decoder]) -> None:
    model, llm = llama
    chunked = Decoder(llm.program, chunk=3)
    assert chunked.generate(PROMPTS, max_new_tokens=12, ignore_eos=True) == wanted(model, 12)
    assert [llm.generate(prompt, max_new_tokens=12, ignore_eos=True) for prompt in PROMPTS] == wanted(model, 12)


def test_memory_is_computed_from_the_types(llama: tuple[Any, Decoder]) -> None:
    model, llm = llama
    assert llm.memory.cache == 2 * 2 * 3 * 2 * 32 * 8 * 4  # layers, key and value, slots, heads, positions, size, f32
    assert llm.memory.weights == sum(p.nbytes for p in model.parameters()) + 4 * 4  # and four rotary frequencies
    assert llm.memory.total == llm.memory.cache + llm.memory.weights and llm.memory.graphs == 0
    assert re.fullmatch(r"weights +\S+ KiB\ncache +24.0 KiB\ngraphs +0 bytes\ntotal +\S+ KiB", repr(llm.memory))
    assert "3 slots of 32 positions on cpu" in repr(llm)


def test_a_cache_that_cannot_fit_is_an_error_before_it_is_allocated() -> None:
    with pytest.raises(InputError, match=r"does not fit into memory: got 192.0 TiB for max_batch=3 and max_length=\d+"):
        made(models.llama(max_position_embeddings=2**40), max_length=2**38)
    with pytest.raises(
        InputError, match=r"for max_batch=10000000000 and max_length=32; need at most [\d.]+ GiB on cpu\."
    ):
        made(models.llama(), max_batch=10**10)


def test_it_is_a_model_of_transformers(llama: tuple[Any, Decoder]) -> None:
    model, llm = llama
    other = llm.for_transformers()
    ids = torch.tensor([[0, 0, 5, 9, 31], [11, 3, 4, 60, 22]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    got = other.generate(**batch, max_new_tokens=8, do_sample=False)
    assert torch.equal(got, model.generate(**batch, max_new_tokens=8, do_sample=False))
    torch.testing.assert_close(other(ids[1:]).logits, model(ids[1:]).logits)


def test_an_artefact_is_the_same_decoder(llama: tuple[Any, Decoder], tmp_path: Path) -> None:
    _, llm = llama
    llm.save(tmp_path / "artefact")
    again = qcompiler.load(tmp_path / "artefact")
    assert isinstance(again, Decoder)
    assert again.generate(PROMPTS, max_new_tokens=6) == llm.generate(PROMPTS, max_new_tokens=6)
    assert list(again.stages) == list(llm.stages) and repr(again.memory) == repr(llm.memory)
    ids = torch.tensor([[11, 3, 4, 60]])
    assert torch.equal(again.for_transformers()(ids).logits, llm.for_transformers()(ids).logits)


def test_a_compiled_model_makes_a_decoder_and_says_so() -> None:
    model = models.llama()
    compiled = qcompiler.compile(
        model, pipeline="canonicalize; dead-code", example_inputs=(torch.ones(2, 7, dtype=torch.int64),), strict=False
    )
    with pytest.raises(QCompilerError, match=r"does not generate. Make a decoder from it: compiled.decoder"):
        compiled.generate([5])
    llm = compiled.decoder(max_batch=3, max_length=32)
    assert llm.generate(PROMPTS, max_new_tokens=8, ignore_eos=True) == wanted(model, 8)
    assert compiled.decoder(max_batch=1).step.capacity == 128
    with pytest.raises(InputError, match="the model has fewer positions than max_length: got 1000; need at most 128"):
        compiled.decoder(max_length=1000)
    with pytest.raises(InputError, match="max_length is wrong: got '9'; need 1 or more"):
        compiled.decoder(max_length="9")  # type: ignore[arg-type]  # wrong on purpose


def test_a_quantized_model_and_cache() -> None:
    llm = made(models.llama(), scheme="fp8_tile", kv_cache="fp8")
    assert len(llm.report.quantized) == 14
    assert llm.memory.cache == 2 * 2 * 3 * 2 * 32 * (8 + 4)
    assert llm.memory.copies == 0
    together = llm.generate(PROMPTS, max_new_tokens=6, ignore_eos=True)
    assert together == [llm.generate(prompt, max_new_tokens=6, ignore_eos=True) for prompt in PROMPTS]
    codes = [weight for weight in llm.graph.weights.values() if weight.dtype == torch.float8_e4m3fn]
    assert llm.memory.copies == sum(4 * weight.numel() for weight in codes) > 0
    assert "\ncopies" in repr(llm.memory)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"max_length": 1000}, InputError, "the model has fewer positions than max_length: got 1000; need at most 128"),
        ({"max_batch": 0}, InputError, "max_batch is wrong: got 0; need 1 or more"),
        ({"max_length": -1}, InputError, "max_length is wrong: got -1"),
        (
            {"kv_cache": "fp4"},
            PassError,
            "there is no such format of a cache: got 'fp4'. Did you mean 'fp8'? Known: fp8,",
        ),
        ({"ignore": ["lm_head"]}, PassError, "there are overrides, but no scheme that they override"),
        ({"scheme": "fp9_tile"}, PassError, "fp8_tile"),
        ({"sharding": "tp; sp"}, PassError, "a sharding needs a mesh: got sharding='tp; sp' and no mesh"),
        ({"tokenizer": "folder"}, InputError, "the tokenizer is of a wrong type: got str; need a tokenizer of transf"),
        ({"device": "cuda:99"}, InputError, "torch does not find the device: got 'cuda:99'"),
    ],
)
def test_wrong_options(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        made(models.llama(), **options)


def test_what_is_no_model() -> None:
    with pytest.raises(InputError, match="does not return logits: got 32 numbers for each token; need one for each"):
        made(models.llama().model)
    with pytest.raises(CaptureError, match=r"only a torch\.nn\.Module or an ExportedProgram can be captured: got int"):
        made(3)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_decoder_is_neither_copied_nor_pickled(llama: tuple[Any, Decoder], copied: Callable[[Any], Any]) -> None:
    with pytest.raises(QCompilerError, match=r"a decoder cannot be copied or pickled\. Save it, and load it again"):
        copied(llama[1])


def test_a_model_that_is_not_causal_is_refused() -> None:
    with pytest.raises(PassError, match="cache"):
        made(models.bert())


# Texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer whose tokens are bytes, and a chat template."""
    path = tmp_path_factory.mktemp("model") / "llama"
    models.llama(vocab_size=257).save_pretrained(path)
    tokenizer = models.byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(path)
    return path


def test_text_from_a_folder_and_its_artefact(folder: Path, tmp_path: Path) -> None:
    llm = made(folder, max_length=64)
    text = llm.generate("abc", max_new_tokens=9)
    assert isinstance(text, str) and "".join(llm.stream("abc", max_new_tokens=9)) == text
    chat = [{"role": "user", "content": "x"}]
    assert llm.generate(chat, max_new_tokens=9) == llm.generate("user: x\n", max_new_tokens=9)
    llm.save(tmp_path / "artefact")
    again = qcompiler.load(tmp_path / "artefact")
    assert again.generate(["abc", chat], max_new_tokens=9) == llm.generate(["abc", chat], max_new_tokens=9)
    made_by = pipeline("text-generation", model=again.for_transformers(), tokenizer=again.tokenizer)
    (answer,) = made_by("abc", max_new_tokens=9, do_sample=False, return_full_text=False)
    assert answer["generated_text"] == text
    file = tmp_path / "artefact" / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "x": 1}))
    with pytest.raises(ArtefactError, match=r"tokenizer_config.json"):
        qcompiler.load(tmp_path / "artefact")


def test_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = str(tmp_path / "artefact")
    common = ["--prompt", "abc", "--max-new-tokens", "7", "--quiet"]
    assert main(["generate", str(folder), *common, "--scheme", "none", "--max-length", "64", "--save", saved]) == 0
    out, err = capsys.readouterr()
    assert "Loading weights" not in err
    assert re.search(r"7 tokens in \d+\.\d\d s, the first text after .* s: \d+\.\d tokens per second", err)
    assert main(["generate", saved, *common]) == 0
    assert capsys.readouterr().out == out
    assert main(["generate", saved, *common, "--chat", "--temperature", "0.8", "--top-p", "0.9", "--stop", "zz"]) == 0
    capsys.readouterr()
    assert main(["bench", saved, "--decode", "1", "--context", "4", "--repeats", "3", "--json", "--quiet"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["sequences"] for row in rows] == [1] and rows[0]["tokens_per_second"] > 0
    assert main(["generate", saved, *common, "--kv-cache", "fp8"]) == 1
    assert "--kv-cache has no effect on an artefact" in capsys.readouterr().err
    assert main(["bench", saved]) == 1
    assert "the artefact is a decoder" in capsys.readouterr().err


def test_the_kernel_of_attention_gets_the_start_that_the_host_knows(llama: tuple[Any, Decoder]) -> None:
    """Otherwise long chunks would run through the kernel for decoding."""
    _, llm = llama
    (call, _) = (line for line in llm.source.splitlines() if "kernels.attend_to_cache(" in line)
    assert "slots, lengths, None, start, " in call
