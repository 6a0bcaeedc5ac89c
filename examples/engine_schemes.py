"""Writes a small random model with another scheme in each layer, for a check of tensor parallelism in vLLM.

    make engine                                       or: python examples/engine_schemes.py FOLDER

FOLDER/layers is the checkpoint, in qcompiler's own format. FOLDER/reference.json has what `engine_check.py` compares it
with: qcompiler's log-probabilities and greedy answers, and the float model's log-probabilities.

The model has weights of 128 and more rows for each of two processes, so that no block is cut, and no norm before its
projections, so that smoothing multiplies their inputs by factors that no weight absorbs.
"""

import argparse
import json
from pathlib import Path

import torch
from engine_reference import logprobs
from transformers import AutoModelForCausalLM, Olmo2Config

import qcompiler

SCHEMES = (
    "fp8_tile", "fp8_tile{k_block=64, numerics=vllm}", "fp8_row", "fp8_tensor_static", "int8_row", "int8_row{w=tensor}",
    "int8_tensor_static{w=channel}", "smoothquant_o1", "smoothquant_o3",
)  # fmt: skip
"""Those whose result for a token does not depend on later tokens, as a scale for a whole batch would."""


def main() -> None:
    """Writes the checkpoint and the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="FOLDER")
    options = parser.parse_args()

    torch.manual_seed(0)
    config = Olmo2Config(
        hidden_size=256, intermediate_size=512, num_hidden_layers=len(SCHEMES), num_attention_heads=4,
        num_key_value_heads=2, head_dim=128, vocab_size=128, max_position_embeddings=512, initializer_range=0.1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    texts = torch.randint(3, config.vocab_size, (3, 64))
    llm = qcompiler.decoder(
        model, scheme="fp8_tile", max_length=128, calibration=[{"input_ids": texts}],
        overrides={f"*.layers.{layer}.*": scheme for layer, scheme in enumerate(SCHEMES)},
    )  # fmt: skip
    qcompiler.checkpoints.write(llm, options.output / "layers", "qcompiler", model=model)
    reader, questions = llm.for_transformers(), texts[:, :8].tolist()
    found = {
        "logprobs": [logprobs(reader, ids[None]) for ids in texts],
        "answers": [llm.generate(ids, max_new_tokens=8, ignore_eos=True) for ids in questions],
    }
    reference = {
        "dtype": "float32", "texts": texts.tolist(), "questions": questions, "schemes": {"layers": found},
        "float": [logprobs(model, ids[None]) for ids in texts],
    }  # fmt: skip
    (options.output / "reference.json").write_text(json.dumps(reference), encoding="utf-8")


if __name__ == "__main__":
    main()
