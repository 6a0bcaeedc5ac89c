"""The small trained language model: it is trained, it is what inject_outliers leaves it, and it can be compiled."""

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import qcompiler
from examples import tiny_lm
from examples.tiny_lm import Config, RMSNorm, TinyLM
from qcompiler import CompiledModel, InputError
from qcompiler.runtime.weights import named_tensors

# transformers compiles some losses with torch.jit.script when it is imported, which newer Pythons call deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")

LLAMA_NAMES = {
    "embed.": "embed_tokens.", "attention_norm.": "input_layernorm.", "mlp_norm.": "post_attention_layernorm.",
    "attention.out.": "attention.o.", "attention.": "self_attn.", ".q.": ".q_proj.", ".k.": ".k_proj.",
    ".v.": ".v_proj.", ".o.": ".o_proj.", ".gate.": ".gate_proj.", ".up.": ".up_proj.", ".down.": ".down_proj.",
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SMALL = Config(vocabulary=32, hidden=64, mlp=96, layers=2, heads=2, kv_heads=1, head_size=16)


@pytest.fixture(scope="module")
def model() -> TinyLM:
    return tiny_lm.load(dtype=torch.float32)


@pytest.fixture(scope="module")
def held_out() -> Tensor:
    """8 KiB of source that training never saw, from sixteen places."""
    text = tiny_lm.text(held_out=True)
    starts = torch.linspace(0, len(text) - tiny_lm.CONTEXT, 16).long()
    return torch.cat([text[start : start + tiny_lm.CONTEXT] for start in starts.tolist()])


@pytest.fixture(scope="module")
def plain_loss(model: TinyLM, held_out: Tensor) -> float:
    return tiny_lm.loss(model, held_out)


@pytest.fixture(scope="module")
def fast(model: TinyLM) -> CompiledModel:
    ids = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(0))
    return qcompiler.compile(model, example_inputs=(ids,), scheme="fp8_tile")


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def ids(rows: int, length: int, vocabulary: int = 256) -> Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(rows))


def test_the_stored_weights_are_small_and_say_what_they_are(model: TinyLM) -> None:
    assert tiny_lm.WEIGHTS.stat().st_size < 10_000_000
    with safe_open(tiny_lm.WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert {tensor.dtype for tensor in load_file(tiny_lm.WEIGHTS).values()} == {torch.bfloat16}
    assert int(metadata["parameters"]) == sum(parameter.numel() for parameter in model.parameters())
    assert int(metadata["steps"]) > 1000 and metadata["python"].startswith("3.")
    assert float(metadata["held_out_loss"]) < 1.0 and metadata["held_out_unit"] == "nats per byte"


def test_the_model_is_trained(model: TinyLM, held_out: Tensor, plain_loss: float) -> None:
    """0.96 nats were measured with Python 3.11, whose library differs a little from that of other versions.

    Bytes drawn alike cost 5.5 nats, and text read backwards is a foreign language.
    """
    assert plain_loss < 1.3
    piece = held_out[:2049]
    assert tiny_lm.loss(model, piece.flip(0)) > 3
    assert abs(tiny_lm.loss(tiny_lm.load(), piece) - tiny_lm.loss(model, piece)) < 0.01
    assert tiny_lm.perplexity(model, piece) == math.exp(tiny_lm.loss(model, piece))


def test_it_computes_what_llama_computes() -> None:
    torch.manual_seed(0)
    model = TinyLM(SMALL).eval()
    for norm, _ in tiny_lm.norms(model):
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
    llama: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)).eval()  # type: ignore[no-untyped-call]
    llama.load_state_dict({llama_name(name): tensor for name, tensor in model.state_dict().items()})
    with torch.no_grad():
        assert relative(model(ids(3, 40, 32)), llama(ids(3, 40, 32)).logits) < 1e-5


def llama_name(name: str) -> str:
    for ours, theirs in LLAMA_NAMES.items():
        name = name.replace(ours, theirs)
    return name if name.startswith("lm_head") else f"model.{name}"


def test_the_loss_is_the_mean_over_all_windows(held_out: Tensor) -> None:
    torch.manual_seed(0)
    model = TinyLM()
    text = held_out[:100]
    with torch.no_grad():
        pieces = [model(text[None, at : at + 20].long())[0].log_softmax(-1) for at in (0, 20, 40, 60)]
    nats = -torch.cat(pieces)[torch.arange(80), text[1:81].long()].mean()
    for batch in (1, 3, 16):
        assert tiny_lm.loss(model, text, length=20, batch=batch) == pytest.approx(float(nats), rel=1e-5)
    with pytest.raises(InputError, match="too short to predict: got 20 tokens; need at least 21"):
        tiny_lm.loss(model, text[:20], length=20)


def test_files_are_either_held_out_or_not() -> None:
    held_out, training = (bytes(tiny_lm.text(held_out=which).tolist()).split(b"\0") for which in (True, False))
    assert not {file for file in held_out if len(file) > 1000} & set(training)
    assert 0.01 < len(b"".join(held_out)) / len(b"".join(training)) < 0.12
    heads = b"\n".join(file[:2000] for file in held_out)
    assert b"Extract, format and print information about Python stack traces" in heads
    assert not any(b"Python Character Mapping Codec" in file[:200] for file in held_out + training)


@pytest.mark.parametrize(("factor", "limit"), [(1024.0, 0.0), (0.125, 0.0), (3.0, 1e-5), (100.0, 1e-5)])
@pytest.mark.parametrize("channels", [[0], [7, 200, 255, 7]])
def test_outliers_leave_the_function_as_it_is(
    model: TinyLM, factor: float, limit: float, channels: Sequence[int]
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = tiny_lm.inject_outliers(model, factor, channels)
    with torch.no_grad():
        assert relative(changed(ids(2, 33)), model(ids(2, 33))) <= limit
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_outliers_keep_the_bits_in_bf16() -> None:
    model = tiny_lm.load()
    with torch.no_grad():
        assert torch.equal(tiny_lm.inject_outliers(model, 64, [3, 130])(ids(2, 33)), model(ids(2, 33)))


def test_outliers_are_in_what_every_norm_gives(model: TinyLM) -> None:
    changed = tiny_lm.inject_outliers(model, 64, [3, 130])
    before, after = (norm_outputs(each) for each in (model, changed))
    assert len(before) == 2 * model.config.layers + 1
    for plain, scaled in zip(before, after, strict=True):
        ratio = scaled / plain
        assert ratio[[3, 130]].tolist() == [64, 64] and ratio.sum() == 254 + 128


def norm_outputs(model: TinyLM) -> list[Tensor]:
    """The largest activation of each channel after each norm."""
    found: list[Tensor] = []
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    hooks = [norm.register_forward_hook(lambda *call: found.append(call[-1].abs().amax((0, 1)))) for norm in norms]
    with torch.no_grad():
        model(ids(2, 33))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    ("factor", "channels", "message"),
    [
        (2, [256], "no such channel: got 256; need 0 to 255"),
        (2, [-1], "no such channel: got -1"),
        (0, [1], "a factor of outliers must be positive and finite: got 0"),
        (math.inf, [1], "a factor of outliers must be positive and finite: got inf"),
    ],
)
def test_outliers_refused(model: TinyLM, factor: float, channels: list[int], message: str) -> None:
    with pytest.raises(InputError) as error:
        tiny_lm.inject_outliers(model, factor, channels)
    assert str(error.value).startswith(message)


def test_every_linear_but_the_vocabulary_projection_is_quantized(fast: CompiledModel) -> None:
    assert len(fast.report.quantized) == 6 * 7
    (head,) = fast.report.skipped
    assert head.module == "lm_head" and head.reason.startswith("it is the vocabulary projection: the model names")


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 17), (1, 130), (2, 512)])
def test_the_compiled_model_takes_other_sizes(fast: CompiledModel, model: TinyLM, rows: int, length: int) -> None:
    (captured,) = qcompiler.interpret(fast.stages["captured"], [ids(rows, length)], named_tensors(model))
    with torch.no_grad():
        want = model(ids(rows, length))
    assert relative(captured, want) < 1e-5
    got = fast(ids(rows, length))
    assert got.shape == (rows, length, 256) and 1e-3 < relative(got, want) < 0.2


def test_the_quantized_model_is_about_as_good(fast: CompiledModel, held_out: Tensor, plain_loss: float) -> None:
    """0.001 nats were measured."""
    assert abs(tiny_lm.loss(fast, held_out) - plain_loss) < 0.01


def test_a_model_of_other_sizes_in_bf16() -> None:
    torch.manual_seed(0)
    model = TinyLM(replace(SMALL, layers=1)).bfloat16().eval()
    compiled = qcompiler.compile(model, example_inputs=(ids(2, 9, 32),), scheme="fp8_tile")
    assert len(compiled.report.quantized) == 7 and compiled(ids(3, 5, 32)).dtype is torch.bfloat16


def test_training_writes_what_can_be_loaded(tmp_path: Path, root: Path) -> None:
    file = tmp_path / "new" / "lm.safetensors"
    script = str(root / "examples/train_tiny_lm.py")
    command = [sys.executable, "-W", "error", script, "--minutes", "0.02", "--batch", "1", "--output", str(file)]
    command += ["--held-out-bytes", "600", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "step      0  training 5." in done.stdout and "held out, in bf16" in done.stdout
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    tiny_lm.load(file)
