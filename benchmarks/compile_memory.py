"""Extra memory that `compile` needs: the peak resident size of a fresh process.

    python benchmarks/compile_memory.py [--out FOLDER]

The model is Llama-3.2-1B built from its configuration, with random bfloat16 weights; `compile` gets the only reference
to it. The peak (VmHWM of Linux, reset after the model is built) covers the whole process: tracing, the check against
the model with a batch of 2 x 8 tokens, libraries loaded during compilation, and the quantized weights.
"""

import gc
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness
import torch
import transformers

import qcompiler

LLAMA_3_2_1B: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    "tie_word_embeddings": True, "dtype": torch.bfloat16,
}  # fmt: skip
CHILD = "--child"
MB = 1e6


def resident(field: str) -> float:
    """A field of /proc/self/status in MB: VmRSS is the current size, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 / MB for line in lines if line.startswith(field))


def build() -> torch.nn.Module:
    """Builds the model without a float32 copy."""
    config = transformers.LlamaConfig(**LLAMA_3_2_1B)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    # Tables such as rotary frequencies are computed, not random.
    tables = {name: tensor for name, tensor in transformers.LlamaForCausalLM(small(config)).named_buffers()}
    model.to_empty(device="cpu")
    model.tie_weights()
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor, std=0.02)
    for name, tensor in model.named_buffers():
        tensor.copy_(tables[name])
    return model.eval()


def small(config: Any) -> Any:
    """The same configuration, minimal in everything that does not affect these tables."""
    return type(config)(**{**LLAMA_3_2_1B, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 8})


def child() -> None:
    """Builds and compiles the model, then prints one JSON line."""
    transformers.utils.logging.set_verbosity_error()
    holder = [build()]
    size = sum(tensor.nbytes for tensor in holder[0].parameters()) / MB
    ids = torch.randint(0, 1000, (2, 8))
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset VmHWM
    start = time.perf_counter()
    fast = qcompiler.compile(holder.pop(), example_inputs=(ids,))
    seconds = time.perf_counter() - start
    peak = resident("VmHWM")
    gc.collect()
    row = {
        "model MB": size,
        "RSS before MB": before,
        "peak MB": peak,
        "peak - before MB": peak - before,
        "(model + peak - before) / model": (size + peak - before) / size,
        "RSS after MB": resident("VmRSS"),
        "quantized model MB": sum(tensor.nbytes for tensor in fast.buffers()) / MB,
        "compile s": seconds,
        "matmuls quantized": len(fast.report.quantized),
    }
    print(json.dumps(row))


def main() -> None:
    if CHILD in sys.argv:
        return child()
    harness.arguments()
    done = subprocess.run([sys.executable, __file__, CHILD], stdout=subprocess.PIPE, text=True, check=True)
    facts = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    title = "Peak memory of compile() for a random bfloat16 Llama-3.2-1B on the CPU"
    harness.report("compile-memory", title, [json.loads(done.stdout.splitlines()[-1])], facts)


if __name__ == "__main__":
    main()
