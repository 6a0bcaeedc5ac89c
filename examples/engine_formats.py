"""Writes checkpoints in each format that vLLM and transformers read, and compares what transformers loads with them.

    make engine                                       or: python examples/engine_formats.py FOLDER

A case is a model, a format, a scheme, and options of `compile`. FOLDER/cases.json has for each case what
`save_checkpoint` refuses vLLM, and the folder, which is written regardless. A tool that cannot read a folder must have
been refused, and a tool that can must not: this program checks transformers, `engine_formats_check.py` vLLM.

The models are SmolLM2 with two of its layers, whose widths are not multiples of 128, and a random Llama with widths
of 256 and 512.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from smollm2 import load, windows
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import qcompiler
from qcompiler.checkpoints import read

LAYERS = 2
TOKENS = 16

CASES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("even", "fp8", "fp8_tile", {}),
    ("ragged", "fp8", "fp8_tile", {}),
    ("even", "compressed-tensors", "fp8_tile", {}),
    ("ragged", "compressed-tensors", "fp8_tile", {}),
    ("ragged", "compressed-tensors", "fp8_row", {}),
    ("ragged", "compressed-tensors", "fp8_tensor", {}),
    ("ragged", "compressed-tensors", "fp8_tensor_static", {}),
    ("ragged", "compressed-tensors", "int8_row", {}),
    ("ragged", "compressed-tensors", "int8_row{w=tensor}", {}),
    ("ragged", "compressed-tensors", "int8_tensor_static", {}),
    ("ragged", "compressed-tensors", "int8_tensor_static{w=channel}", {}),
    ("even", "fp8", "fp8_tile", {"overrides": {"*.q_proj": None}}),
    ("even", "compressed-tensors", "int8_row", {"overrides": {"*.q_proj": None}}),
    ("even", "fp8", "fp8_tile", {"overrides": {"lm_head": "fp8_tile"}}),
    ("even", "compressed-tensors", "int8_row", {"overrides": {"lm_head": "int8_row"}}),
)
"""The model, the format, the scheme, and further options."""


def main() -> int:
    """Writes the folders and the list of them; returns 1 if a case of transformers fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="FOLDER")
    parser.add_argument("--folder", type=Path, help="a Hugging Face folder of SmolLM2 instead of the installed model")
    options = parser.parse_args()

    disable_progress_bar()
    set_verbosity_error()
    torch.manual_seed(0)
    ragged, tokenizer = load(options.folder, "cpu")
    del ragged.model.layers[LAYERS:]
    ragged.config.num_hidden_layers = LAYERS
    models = {"ragged": ragged, "even": even()}
    ids = windows(tokenizer, 1)[0][:, :TOKENS]
    found, right = [], True
    for number, (name, format, scheme, extra) in enumerate(CASES):
        tokens, folder = ids % models[name].config.vocab_size, options.output / str(number)
        compiled = qcompiler.compile(
            models[name], scheme=scheme, example_inputs=(tokens,), calibration=[tokens], dynamic_shapes=None, **extra
        )
        refusals = {reader: refusal(compiled, folder, format, reader) for reader in ("vllm", "transformers")}
        compiled.save_checkpoint(folder, format, reader=None, model=models[name])
        title = f"{format}, {scheme}, {name} widths" + "".join(f", {key} {value}" for key, value in extra.items())
        result, reads = in_transformers(folder)
        right &= said(title, "transformers", refusals["transformers"], result, reads)
        found.append({"title": title, "folder": folder.name, "ids": tokens[0].tolist(), "refusal": refusals["vllm"]})
    (options.output / "cases.json").write_text(json.dumps(found), encoding="utf-8")
    return int(not right)


def said(title: str, reader: str, refusal: str | None, result: str, reads: bool) -> bool:
    """Prints a case; returns whether it was refused if and only if the reader does not read it."""
    passes = (refusal is None) is reads
    print(f"{title}: {reader}: {result}; {'written' if refusal is None else 'refused: ' + refusal}: "
          f"{'passes' if passes else 'FAILS'}", flush=True)  # fmt: skip
    return passes


def even() -> Any:
    """A random Llama in which every layer, the head included, has whole blocks."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, max_position_embeddings=512, initializer_range=0.1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def refusal(compiled: Any, folder: Path, format: str, reader: str) -> str | None:
    """The reason why `save_checkpoint` refuses a reader; None if it does not."""
    try:
        compiled.save_checkpoint(folder, format, reader=reader)
    except qcompiler.QCompilerError as error:
        return str(error).splitlines()[1].partition("]: ")[2].partition(". Leave")[0]
    return None


def in_transformers(folder: Path) -> tuple[str, bool]:
    """What transformers makes of a folder, and whether it has all weights and runs.

    It keeps scales in the dtype of the model, so weights may differ by one rounding to bf16.
    """
    files = read(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model(torch.arange(TOKENS)[None])
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}", False
    pairs = [(model.get_parameter(name).float(), files.quantized(name).dequantized()) for name in files.stored]
    equal = sum(torch.allclose(got, want, rtol=2**-7, atol=0) for got, want in pairs)
    return f"{equal} of {len(pairs)} weights are equal", equal == len(pairs)


if __name__ == "__main__":
    sys.exit(main())
