"""Tests the check after capture: it must reject wrong graphs and accept right ones that run on other kernels.

    python benchmarks/capture_check.py [--out FOLDER]

The benchmark captures deep bf16 models with random weights on the CPU, where graph and model agree bit for bit. Then it
runs the graph on other kernels: matmuls that add in another order or keep partial sums in bf16, and other attention. A
right graph must pass with every kernel. A wrong graph, made by editing the text of one layer, must be rejected with
every kernel, although rounding hides many faults. The columns "fault" and "rounding" show the relative change of the
logits (norm of the difference) caused by the fault alone (in FP64) and by the other kernels alone.
"""

import platform
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import harness
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from qcompiler.capture import Captured, capture
from qcompiler.capture.comparison import compare
from qcompiler.capture.double import DoublePrecision, value_of, widened
from qcompiler.capture.examples import Call
from qcompiler.capture.runs import Runs
from qcompiler.errors import CaptureError
from qcompiler.ir import Graph

SEEDS = 6
WIDTH: dict[str, Any] = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BLOCK: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32
}  # fmt: skip


def llama() -> torch.nn.Module:
    """24 layers; each norm has random gains."""
    return _made(transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDTH, **BLOCK, num_hidden_layers=24)))


def gpt2() -> torch.nn.Module:
    """16 layers with biases and GELU."""
    config = transformers.GPT2Config(**WIDTH, n_embd=128, n_layer=16, n_head=4, n_positions=64)
    return _made(transformers.GPT2LMHeadModel(config))


def mixtral() -> torch.nn.Module:
    """8 layers of 8 experts, top 2: the routing jumps when router scores are close."""
    config = transformers.MixtralConfig(
        **WIDTH, **BLOCK, num_hidden_layers=8, num_local_experts=8, num_experts_per_tok=2
    )
    return _made(transformers.MixtralForCausalLM(config))


def _made(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, tensor in model.named_parameters():  # weights of unit gain, as training leaves them, biases and gains
            fan = tensor.shape[-1] if tensor.ndim > 1 else 16
            tensor.add_(torch.randn_like(tensor) / fan**0.5 * (0.25 if "embed" in name else 1.0))
    return model.to(torch.bfloat16).eval()


# Other kernels


class Kernels(TorchDispatchMode):
    """Other implementations of operators.

    Args:
        parts: Number of partial sums of a matmul, as in split-K.
        narrow: Whether partial sums have the dtype of the result.
        attention: Whether attention is computed from its definition.
        seed: Seed of a permutation of K.
    """

    def __init__(self, parts: int, narrow: bool, attention: bool, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no types
        self.parts, self.narrow, self.attention = parts, narrow, attention
        self.random = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operator with its replacement kernel."""
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in ("mm", "bmm", "addmm") and self.parts and not kwargs:
            total = self.matmul(*args[-2:])
            return total if name != "addmm" else args[0] + total
        if name == "_scaled_dot_product_flash_attention_for_cpu" and self.attention:
            return attend(func(*args, **kwargs), *args, **kwargs)
        return func(*args, **kwargs)

    def matmul(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """A matmul that adds along K in a different order."""
        order = torch.randperm(left.shape[-1], generator=self.random)
        parts = zip(left[..., order].chunk(self.parts, -1), right[..., order, :].chunk(self.parts, -2), strict=True)
        if self.narrow:
            return torch.stack([a @ b for a, b in parts]).sum(0)
        return torch.stack([a.float() @ b.float() for a, b in parts]).sum(0).to(left.dtype)


def attend(
    fused: tuple[torch.Tensor, torch.Tensor], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float = 0.0,
    causal: bool = False, *, attn_mask: torch.Tensor | None = None, scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention computed from its definition, with the memory layout of the fused kernel."""
    with sdpa_kernel(SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask, dropout, causal, scale=scale)
    return torch.empty_like(fused[0]).copy_(out), fused[1]


KERNELS: Mapping[str, tuple[int, bool, bool]] = {
    "another order": (1, False, False),
    "split-K of 4": (4, False, False),
    "split-K of 4 in bf16": (4, True, False),
    "split-K of 16 in bf16": (16, True, False),
    "other attention": (0, False, True),
    "other attention, split-K of 4 in bf16": (4, True, True),
}
"""Name -> arguments of `Kernels`."""


@contextmanager
def both(first: Any, second: Any) -> Iterator[None]:
    """Nests two contexts."""
    with first, second:
        yield


class OtherKernels(Runs):
    """Runs a graph on different kernels than the model."""

    kernels: Callable[[], Any] | None = None

    def of_graph(self, call: Call, mode: Any = None, enter: Any = torch.clone) -> dict[str, Any]:
        """Copies the runner with other kernels."""
        if self.kernels is None:
            return super().of_graph(call, mode, enter)
        inner = self.kernels()
        return super().of_graph(call, inner if mode is None else both(mode, inner), enter)


# Wrong graphs

MODELS: Mapping[str, Callable[[], torch.nn.Module]] = {"llama": llama, "gpt2": gpt2, "mixtral": mixtral}

FAULTS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "llama": {
        "epsilon 1e-5 for 1e-6": (r"1e-06(?=.*layers\.11\.post)", "1e-05"),
        "attention scale off by 1%": (r"0\.1767766952966369(?=.*layers\.11\.)", "0.1785444619"),
        "a dropped residual": (r"add\.Tensor\(%add_\d+, (%linear_\d+)\)(?=.*layers\.11\")", r"mul.Tensor(\1, 1.0)"),
        "q and k swapped": (
            r"  (%\w*attention_11 = .*?\()(%\w+), (%\w+)",
            "  %k1 = aten.transpose.int(\\3, 1, 2) : bf16[s0, s1, 4, 32]\n"
            "  %k2 = aten.clone(%k1) {memory_format = #contiguous_format} : bf16[s0, s1, 4, 32]\n"
            "  %k3 = aten.transpose.int(%k2, 1, 2) : bf16[s0, 4, s1, 32]\n  \\1%k3, \\2",
        ),
        "up's weight for gate's": (r"(linear\(%\w+, %model\.layers\.11\.mlp\.)gate", r"\1up"),
        "another layer's gain": (r"%model\.layers\.11(\.post_attention_layernorm\.weight, )", r"%model.layers.10\1"),
        "rotary sign": (r"neg\((%\w+)\)(?=.*layers\.11\.)", r"mul.Tensor(\1, 1.0)"),
        "causal mask off by one": (
            r"  (%\w+ = aten\.le\.Tensor\(%index_1, )%index\)",
            "  %late = aten.add.Tensor(%index, 1) : i64[s0, 1, s1, 1]\n  \\1%late)",
        ),
        "one wrong element of a mask": (
            r"  (%\w+ = aten\.expand\()(%bitwise_and\w*_1)\b",
            "  %row = aten.eq.Scalar(%index, 7) : b8[s0, 1, s1, 1]\n"
            "  %column = aten.eq.Scalar(%index_1, 3) : b8[s0, 1, 1, s1]\n"
            "  %one = aten.bitwise_and.Tensor(%row, %column) : b8[s0, 1, s1, s1]\n"
            "  %wrong = aten.bitwise_xor.Tensor(\\2, %one) : b8[s0, 1, s1, s1]\n  \\1%wrong",
        ),
        "all sequences read the first": (
            r"  (%embedding = aten\.embedding\(%\w[\w.]+, )%input_ids",
            "  %row = aten.slice.Tensor(%input_ids, 0, 0, 1) : i64[1, s1]\n"
            "  %rows = aten.expand_as(%row, %input_ids) : i64[s0, s1]\n  \\1%rows",
        ),
    },
    "gpt2": {
        "a dropped bias": (r"addmm\(%transformer\.h\.7\.mlp\.c_fc\.bias, ", "mm("),
        "erf for tanh in GELU": (
            r"(pow\.Tensor_Scalar\((%\w+), 3\.0\)[^\n]*h\.7\.mlp\.act.*?)mul\.Tensor\(%\w+, %\w+\)",
            r"\1gelu(\2)",
        ),
        "0.0447 for 0.044715 in GELU": (r"0\.044715(?=.*h\.7\.mlp)", "0.0447"),
        "positions off by one": (r"(%\w+ = aten\.add\.Tensor\(%arange, )0", r"\g<1>1"),
        "attention scale off by 0.01%": (r"0\.1767766952966369(?=.*h\.7\.)", "0.1767943729"),
    },
    "mixtral": {
        "routing weights not normalized": (r"div\.Tensor\((%topk_4\.0), %\w+\)", r"mul.Tensor(\1, 1.0)"),
        "another layer's router": (r"%model\.layers\.4(\.mlp\.gate\.weight\))", r"%model.layers.3\1"),
        "k and v swapped": (r"(attention_4 = .*?\(%\w+, )(%\w+), (%\w+)", r"\1\3, \2"),
    },
}
"""Model -> fault -> (regular expression for part of the graph's text, replacement)."""


def planted(captured: Captured, edit: tuple[str, str]) -> Graph:
    """The graph with one fault."""
    text, count = re.subn(*edit, str(captured.graph), count=1, flags=0 if "[^" not in edit[0] else re.DOTALL)
    if count != 1:
        raise ValueError(f"nothing to edit: {edit[0]}")
    graph = Graph.parse(text)
    graph.weights = captured.graph.weights
    return graph


# The experiment


def apart(left: Mapping[str, Any], right: Mapping[str, Any]) -> float:
    """The relative distance between the logits of two runs."""
    (name,) = right
    return harness.relative_error(value_of(left[name]).double(), value_of(right[name]).double())


def refusal(runs: OtherKernels, call: Call) -> str:
    """The result of the check."""
    try:
        compare(runs, call)
    except CaptureError as error:
        return "FP64" if "FP64" in str(error) else "rounding"
    return ""


def calls(seed: int) -> Call:
    """A batch of token ids."""
    random = torch.Generator().manual_seed(seed)
    return (), {"input_ids": torch.randint(3, WIDTH["vocab_size"], (2, 24), generator=random)}


def right(name: str, captured: Captured, model: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """One row per set of kernels: how often a right graph passes."""
    for kind, options in KERNELS.items():
        moved, refused, jumps = [], 0, []
        for seed in range(SEEDS):
            runs = OtherKernels(captured.graph, captured.signature, model)
            runs.kernels = partial(Kernels, *options, seed)
            found, want = runs.of_graph(calls(seed)), runs.of_model(calls(seed))
            moved.append(apart(found, want))
            jumps.append(max(float((found[key] - want[key]).abs().max() / want[key].abs().max()) for key in want))
            refused += bool(refusal(runs, calls(seed)))
        yield {"model": name, "kernels": kind, "rounding": max(moved), "largest": max(jumps), "graphs": SEEDS,
               "refused": refused}  # fmt: skip


def wrong(name: str, captured: Captured, model: torch.nn.Module, noise: float) -> Iterator[dict[str, Any]]:
    """One row per fault: how many sets of kernels reject it."""
    for fault, edit in FAULTS[name].items():
        runs = OtherKernels(planted(captured, edit), captured.signature, model)
        sides = [value_of_run(run) for run in (runs.of_graph, runs.of_model)]
        by = []
        for seed, options in enumerate([None, *KERNELS.values()]):
            runs.kernels = None if options is None else partial(Kernels, *options, seed)
            by.append(refusal(runs, calls(0)))
        yield {"model": name, "wrong": fault, "fault": apart(*sides), "rounding": noise, "graphs": len(by),
               "refused": len(by) - by.count(""), "by": ", ".join(sorted(set(by)))}  # fmt: skip


def value_of_run(run: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """A run in FP64."""
    return run(calls(0), DoublePrecision(), widened)


def main() -> None:
    """Runs all cases and writes two tables."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    passed: list[dict[str, Any]] = []
    caught: list[dict[str, Any]] = []
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model = build()
        captured = capture(model, kwargs=calls(99)[1])
        rows = list(right(name, captured, model))
        caught += wrong(name, captured, model, max(row["rounding"] for row in rows))
        passed += rows
    facts = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    harness.report("capture-check-right", "Right graphs on other kernels: none may be refused", passed, facts)
    harness.report("capture-check-wrong", "Wrong graphs: each must be refused", caught, facts)


if __name__ == "__main__":
    main()
