"""Whole models with random bfloat16 weights: fp8_tile against bf16 and FP8 of torchao, both with torch.compile.

    python benchmarks/whole_model.py [--out FOLDER] [--only llama,mixtral,qwen3-moe,minilm] [--tokens 1x512,16x128]

Times are medians of alternating CUDA-graph replays, without Python overhead and launch gaps. torchao quantizes weights
and activations by row, and is measured where it is installed, except for experts, which it leaves in bf16. A second
table adds up the device time of the kernels of the fp8_tile model.
"""

import argparse
import copy
import gc
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import harness
import torch
import transformers as hf
from torch.profiler import ProfilerActivity, profile

import qcompiler
from codegen.launching.timing import in_turns

VOCABULARY = 1024
COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "dtype": torch.bfloat16, "use_cache": False}
LLAMA_3_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}  # fmt: skip
QWEN3_30B_A3B: dict[str, Any] = {
    "hidden_size": 2048, "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
}  # fmt: skip
MINILM: dict[str, Any] = {
    "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12, "num_hidden_layers": 6,
    "vocab_size": VOCABULARY,
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model, and the shapes of its token ids."""

    title: str
    make: Callable[[], torch.nn.Module]
    tokens: tuple[tuple[int, int], ...]
    torchao: bool = True


SUBJECTS = {
    "llama": Subject(
        "Llama-3-8B, 4 layers",
        lambda: hf.LlamaModel(hf.LlamaConfig(num_hidden_layers=4, **LLAMA_3_8B, **COMMON)),
        ((1, 4096), (16, 128), (1, 512), (1, 16)),
    ),
    "mixtral": Subject(
        "Mixtral-8x7B, 1 layer",
        lambda: hf.MixtralModel(hf.MixtralConfig(num_hidden_layers=1, **LLAMA_3_8B, **COMMON)),
        ((1, 4096), (64, 1)),
        torchao=False,
    ),
    "qwen3-moe": Subject(
        "Qwen3-30B-A3B, 1 layer",
        lambda: hf.Qwen3MoeModel(hf.Qwen3MoeConfig(num_hidden_layers=1, **QWEN3_30B_A3B, **COMMON)),
        ((1, 4096), (64, 1)),
        torchao=False,
    ),
    "minilm": Subject("MiniLM, 6 layers", lambda: hf.BertModel(hf.BertConfig(**MINILM)), ((64, 128),)),
}
BF16, COMPILED, TORCHAO, OURS = "bf16", "bf16, torch.compile", "torchao FP8, torch.compile", "fp8_tile"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(SUBJECTS))
    parser.add_argument("--tokens", default="", help="rows x length of the shapes to measure; by default all")
    given = parser.parse_known_args()[0]
    names, shapes = given.only.split(","), [shape for shape in given.tokens.split(",") if shape]
    rows: list[dict[str, Any]] = []
    kernels: list[dict[str, Any]] = []
    with torch.no_grad():
        for name in names:
            torch.manual_seed(0)
            measure(SUBJECTS[name], shapes, rows, kernels)
            gc.collect()
            torch.cuda.empty_cache()


def measure(
    subject: Subject, shapes: list[str], rows: list[dict[str, Any]], kernels: list[dict[str, Any]]
) -> None:  # fmt: skip
    """Adds rows to both tables, and writes them after each shape, because torch.compile takes a minute for one."""
    with torch.device("cuda"):
        model = subject.make().to(torch.bfloat16).eval()
    models = {BF16: model, COMPILED: static(model), OURS: qcompiler.compile(model, scheme="fp8_tile")}
    if subject.torchao and find_spec("torchao"):
        models[TORCHAO] = by_torchao(model)
    for shape in subject.tokens:
        if shapes and f"{shape[0]}x{shape[1]}" not in shapes:
            continue
        ids = torch.randint(0, VOCABULARY, shape, device="cuda")
        calls = {name: partial(each, input_ids=ids) for name, each in models.items()}
        times = in_turns({name: [call] for name, call in calls.items()}, rounds=7)
        row: dict[str, Any] = {"model": subject.title, "tokens": f"{shape[0]} x {shape[1]}"}
        kernels += [{**row, **each} for each in by_kernel(calls[OURS])]
        row |= {f"{name} ms": times[name] / 1e3 if name in times else None for name in (BF16, COMPILED, TORCHAO, OURS)}
        for name in (COMPILED, TORCHAO):
            row[f"x {name}"] = times[name] / times[OURS] if name in times else None
        rows.append(row)
        harness.gpu_report("whole-model", "Whole models with random bf16 weights: milliseconds of a call", rows)
        harness.gpu_report("whole-model-kernels", "Device time of the kernels of fp8_tile models", kernels)
        torch.compiler.reset()


def static(model: torch.nn.Module) -> Any:
    """The model with torch.compile, compiled again for each shape, which is faster than one for all."""
    return torch.compile(model, dynamic=False)


def by_torchao(model: torch.nn.Module) -> Any:
    """The model with FP8 weights and activations, one scale a row, by torchao."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    other = copy.deepcopy(model)
    quantize_(other, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    # torchao turns this on for the whole process; it takes two minutes for one shape, for elementwise kernels only.
    torch._inductor.config.coordinate_descent_tuning = False
    return static(other)


def by_kernel(call: Callable[[], object], calls: int = 3, most: int = 12) -> list[dict[str, Any]]:
    """Device time of the kernels of a call, the longest first; the time from the end of the one before."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    events = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    times, counts = Counter[str](), Counter[str]()
    last = 0.0
    for event in sorted(events, key=lambda event: event.time_range.end):
        name = _brief(event.name)
        times[name] += event.time_range.end - max(event.time_range.start, last)  # overlapping kernels count once
        counts[name] += 1
        last = event.time_range.end
    total = times.total()
    return [
        {"kernel": name, "launches": counts[name] / calls, "us": time / calls, "% of all": 100 * time / total}
        for name, time in times.most_common(most)
    ]


def _brief(name: str) -> str:
    """The name of a kernel without its namespaces and parameters."""
    name = re.sub(r"^void |\(anonymous namespace\)::|at::native::|at::", "", name)
    return re.sub(r"[<(].*", "", name)[:48]


if __name__ == "__main__":
    main()
