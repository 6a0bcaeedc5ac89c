"""Four layers with the widths of Llama-3-8B, random bfloat16, compiled with each scheme, against the float model.

    python benchmarks/whole_model.py [--out FOLDER]

`eager` is the median over single calls with the device idle before each, including Python launch overhead; `replay` is
the median of alternating CUDA-graph replays, which excludes Python overhead and launch gaps.
"""

from functools import partial
from typing import Any

import harness
import torch
import transformers

import qcompiler
from codegen.launching.timing import in_turns

LLAMA_3_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 1024, "max_position_embeddings": 8192, "dtype": torch.bfloat16,
    "use_cache": False,
}  # fmt: skip
SCHEMES = ("fp8_tile", "fp8_row", "int8_row", "fp8_tensor_static", "smoothquant_o3")
TOKENS = ((1, 16), (1, 512), (1, 4096))


def main() -> None:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.LlamaModel(transformers.LlamaConfig(**LLAMA_3_8B)).to(torch.bfloat16).eval()
    batches = [ids(shape) for shape in TOKENS]
    examples = [{"input_ids": torch.randint(0, 1024, (2, 64), device="cuda")}]
    fast = {scheme: qcompiler.compile(model, scheme=scheme, calibration=examples) for scheme in SCHEMES}
    rows = []
    for batch in batches:
        row: dict[str, Any] = {"tokens": str(list(batch["input_ids"].shape))}
        models = {"bf16": model, **fast}
        with torch.no_grad():
            replays = in_turns({name: [partial(each, **batch)] for name, each in models.items()})
            for name, each in models.items():
                row[f"{name} eager ms"] = harness.eager(partial(each, **batch))
                row[f"{name} replay ms"] = replays[name] / 1e3
        rows.append(row)
    for row in rows:
        for name in ("fp8_tile", "fp8_row", "int8_row"):
            row[f"{name} x bf16, replay"] = row["bf16 replay ms"] / row[f"{name} replay ms"]
    harness.gpu_report("whole-model", __doc__.partition("\n")[0].rstrip("."), rows)


def ids(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 1024, shape, device="cuda")}


if __name__ == "__main__":
    main()
