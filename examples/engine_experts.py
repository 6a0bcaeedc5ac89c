"""Writes a small random mixture of experts, for a check of vLLM's experts.

    make engine                                       or: python examples/engine_experts.py FOLDER

FOLDER/experts is the checkpoint, in qcompiler's own format. FOLDER/reference.json has what `engine_check.py` compares
with it: qcompiler's log-probabilities and greedy answers, and the float model's log-probabilities.

Each expert has 256 inner channels: a block for each of two processes.
"""

import argparse
import json
from pathlib import Path

import torch
from engine_reference import logprobs
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import qcompiler


def main() -> None:
    """Writes the checkpoint and the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="FOLDER")
    options = parser.parse_args()

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=256, moe_intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=128, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, vocab_size=128,
        max_position_embeddings=512, initializer_range=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    texts = torch.randint(3, config.vocab_size, (3, 64))
    llm = qcompiler.decoder(model, scheme="fp8_tile", max_length=128)
    qcompiler.checkpoints.write(llm, options.output / "experts", "qcompiler", model=model)
    reader = qcompiler.compile(model, scheme="fp8_tile", example_inputs=(texts[:1],))
    questions = texts[:, :8].tolist()
    found = {
        "logprobs": [logprobs(reader, ids[None]) for ids in texts],
        "answers": [llm.generate(ids, max_new_tokens=8, ignore_eos=True) for ids in questions],
    }
    reference = {
        "dtype": "float32", "texts": texts.tolist(), "questions": questions, "schemes": {"experts": found},
        "float": [logprobs(model, ids[None]) for ids in texts],
    }  # fmt: skip
    (options.output / "reference.json").write_text(json.dumps(reference), encoding="utf-8")


if __name__ == "__main__":
    main()
