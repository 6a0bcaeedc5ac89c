"""Runs checkpoints in vLLM, and compares its numbers with qcompiler's.

    make engine                 or: python examples/engine_check.py FOLDER [--processes 2 | --compiled]

FOLDER was written by `engine_reference.py`, `engine_schemes.py` or `engine_experts.py`, by default in FP32. For each
checkpoint,

- each quantized layer, and the experts of each mixture, on the input that it gets in vLLM, must give the bits of
  qcompiler's operators on the tensors in the folder; with several processes, on the process's share of them;
- log-probabilities of tokens must differ from qcompiler's by less than the quantization changes them, and perplexities
  by less than 2%.

The whole model cannot have equal bits: vLLM's own kernels for norms, activations and attention round differently, and a
rounding may move an activation to the next code. Each layer multiplies such differences; after a few layers they are as
large as the error of the quantization. A change of the embeddings by 1e-7 has the same effect in qcompiler alone.

With --compiled, vLLM compiles the model and qcompiler's pass fuses quantizations in its graph: most of them must be
fused, and the layers are not compared one by one.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler.checkpoints import Checkpoint, read
from qcompiler.numerics import torch_dtype

TOLERANCE = 0.02
"""Relative difference of perplexities."""

SETTINGS = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}  # fmt: skip
"""No more processes than needed, 1 GiB for the cache, and functions that run in the processes of the layers."""


COMPILED = {"VLLM_DISABLE_COMPILE_CACHE": "1"}
"""Graphs in vLLM's cache would have no report."""


class Comparison:
    """Compares each call of a quantized layer with qcompiler's operators.

    Attributes:
        layers: The number of parts of layers that were compared.
        wrong: The names of parts whose bits differ.
    """

    def __init__(self, folder: Path) -> None:
        self.files: Checkpoint = read(folder)
        self.layers, self.wrong = 0, list[str]()

    def watch(self, model: torch.nn.Module) -> None:
        """Compares from now on."""
        for name, module in model.named_modules():
            if hasattr(module, "quantized_parts"):
                path, _, last = name.rpartition(".")
                merged = module.quant_config.packed_modules_mapping.get(last, [last])
                names = [f"{path}.{part}.weight" for part in merged]
                module.register_forward_hook(partial(self.compare, names))
            elif self.files.schemes is not None and hasattr(module, "w13_weight_scale"):
                module.quant_method.apply = partial(self.compare_experts, name, module.quant_method.apply)

    def compare(self, names: Sequence[str], layer: Any, given: Any, out: Any) -> None:
        """Compares the output of one layer, all of whose parts read one input."""
        x, y = given[0], out[0] if isinstance(out, tuple) else out
        parts = [self.wanted(name, x, layer, part) for name, part in zip(names, layer.quantized_parts, strict=True)]
        for name, want, got in zip(names, parts, y.split([part.shape[-1] for part in parts], -1), strict=True):
            self.layers += 1
            if not torch.equal(want, got):
                self.wrong.append(name)

    def compare_experts(self, name: str, run: Any, layer: Any, x: Tensor, *routed: Any, **others: Any) -> Tensor:
        """Runs the experts of a layer, and compares their output."""
        y = torch.as_tensor(run(layer, x, *routed, **others))
        weights, ids = routed[:2] if routed else (others["topk_weights"], others["topk_ids"])
        self.layers += 1
        if not torch.equal(y, self.wanted_experts(name.removesuffix(".routed_experts"), layer, x, weights, ids)):
            self.wrong.append(name)
        return y

    def wanted_experts(self, name: str, layer: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """The output of the experts in this process, from the tensors in the folder."""
        experts, order = torch.sort(ids.flatten().long(), stable=True)
        count = layer.global_num_experts
        ends = torch.bincount(experts, minlength=count).cumsum(0).int()

        def multiply(x: Tensor, axis: int, *parts: str) -> Tensor:
            """The grouped matmul with this process's share of some parts, cut along an axis."""
            found = [[self.files.quantized(f"{name}.{e}.{part}.weight") for part in parts] for e in range(count)]
            config, spec = layer.moe_config, self.files.schemes.spec(f"{name}.0.{parts[0]}")  # type: ignore[union-attr]
            assert spec is not None
            codes, scale = (
                torch.stack([
                    torch.cat([getattr(each, what).chunk(config.tp_size, axis)[config.tp_rank] for each in expert])
                    for expert in found
                ])
                for what in ("codes", "scale")
            )  # fmt: skip
            ops, block = torch.ops.qcompiler, list(spec.x.block)
            x_q, x_s = ops.quantize(x, block, torch_dtype(spec.x.element), spec.x.profile, "row_major", None)
            return torch.as_tensor(ops.grouped_linear(x_q, x_s, codes, scale, ends, block, list(spec.w.block), x.dtype))

        gate, up = multiply(x[order // ids.shape[1]], 0, "gate_proj", "up_proj").chunk(2, -1)
        outer = multiply(torch.nn.functional.silu(gate) * up, 1, "down_proj") * weights.flatten()[order, None]
        return outer[order.argsort()].view(*ids.shape, -1).sum(1).to(x.dtype)

    def wanted(self, name: str, x: Tensor, layer: Any, part: Any) -> Tensor:
        """The output of one part in this process, from the tensors in the folder."""
        schemes, weight = self.files.schemes, self.files.quantized(name)
        spec = schemes.spec(name.removesuffix(".weight")) if schemes else layer.quant_method.spec
        assert spec is not None
        shares = weight.codes.shape[1] // x.shape[-1]  # of the input
        codes, scale, prescale = (
            mine(tensor, shares, layer) for tensor in (weight.codes, weight.scale, weight.prescale)
        )
        ops, block, element = torch.ops.qcompiler, list(spec.x.block), torch_dtype(spec.x.element)
        if weight.x_scale is None:
            x_q, x_s = ops.quantize(x, block, element, spec.x.profile, "row_major", prescale)
        else:
            x_q, x_s = ops.quantize_static(x, weight.x_scale, block, element, spec.x.profile, prescale), weight.x_scale
        y: Tensor = ops.scaled_linear(x_q, x_s, codes, scale, None, block, list(weight.block), x.dtype)
        if shares > 1:
            from vllm.distributed import tensor_model_parallel_all_reduce  # after the environment is set

            return torch.as_tensor(tensor_model_parallel_all_reduce(y))
        return y.split(part.width, -1)[layer.tp_rank // part.replicas if part.width < part.whole else 0]


def mine(tensor: Tensor | None, shares: int, layer: Any) -> Tensor | None:
    """A process's share of what belongs to the input channels of a layer, unless one number spans them all."""
    if tensor is None or tensor.shape[-1] == 1:
        return tensor
    return tensor.chunk(shares, -1)[layer.tp_rank if shares > 1 else 0].contiguous()


def fused() -> tuple[int, int]:
    """Prints what was fused in this process; returns the number of fused quantizations, and of all."""
    from qcompiler.vllm.fusing import REPORTS  # it imports vLLM, after the environment is set

    (report,) = REPORTS
    print(report)
    return report.quantizations


def watch(folder: Path, model: Any) -> None:
    """Compares the layers of a model from now on."""
    model.comparison = Comparison(folder)
    model.comparison.watch(model)


def compared(model: Any) -> tuple[int, list[str]]:
    """The number of parts of layers that were compared, and the names of those whose bits differ."""
    return model.comparison.layers, model.comparison.wrong


def main() -> int:
    """Prints a row for each scheme; returns 1 if one of them differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--processes", type=int, default=1, help="processes that share each layer")
    parser.add_argument("--compiled", action="store_true", help="compile, and fuse quantizations")
    options = parser.parse_args()
    for name, value in (SETTINGS | (COMPILED if options.compiled else {})).items():
        os.environ.setdefault(name, value)
    reference = json.loads((options.folder / "reference.json").read_text(encoding="utf-8"))
    passed = [
        report(scheme, wanted, reference["float"], measured(options.folder / scheme, reference, options))
        for scheme, wanted in reference["schemes"].items()
    ]
    return int(not all(passed))


def measured(folder: Path, reference: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Log-probabilities of the texts, greedy answers, and the comparison of the layers."""
    from vllm import LLM, SamplingParams  # after the environment is set

    from qcompiler.vllm.fusing import FuseInEngine

    torch.compiler.config.force_disable_caches = True  # graphs in Inductor's cache would have no report, either
    # vLLM would run FP32 models in bf16. Hooks run in eager mode only. Prompts and answers are token ids.
    llm = LLM(
        str(folder), tensor_parallel_size=options.processes, max_model_len=512, dtype=reference["dtype"],
        enforce_eager=not options.compiled, enable_prefix_caching=False, skip_tokenizer_init=True,
        quantization="qcompiler",  # vLLM's own formats, too
        compilation_config={"inductor_compile_config": {"post_grad_custom_post_pass": FuseInEngine()}},
    )  # fmt: skip
    texts, questions = ([{"prompt_token_ids": ids} for ids in reference[key]] for key in ("texts", "questions"))
    length = max(len(answer) for wanted in reference["schemes"].values() for answer in wanted["answers"])
    greedy = partial(SamplingParams, temperature=0, detokenize=False)
    outputs = llm.generate(texts, greedy(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    answers = llm.generate(questions, greedy(max_tokens=length), use_tqdm=False)
    if options.compiled:
        done, of = fused()
        text, good = "quantizations are fused", done > of / 2
    else:
        llm.apply_model(partial(watch, folder))
        llm.generate(texts[:1], greedy(max_tokens=1), use_tqdm=False)
        layers, wrong = zip(*llm.apply_model(compared), strict=True)
        of, failed = sum(layers), [*chain(*wrong)]
        text = "layers have equal bits" + f", not {', '.join(failed[:3])}" * bool(failed)
        good, done = of > 0 and not failed, of - len(failed)
    return {
        "logprobs": [
            [step[token].logprob for step, token in zip(out.prompt_logprobs[1:], out.prompt_token_ids[1:], strict=True)]
            for out in outputs
        ],
        "answers": [list(out.outputs[0].token_ids) for out in answers],
        "layers": f"{done} of {of} {text}",
        "good": good,
    }


def report(scheme: str, wanted: dict[str, Any], in_float: list[list[float]], found: dict[str, Any]) -> bool:
    """Prints the comparison of one scheme; returns whether it passes."""
    ours, theirs = perplexity(wanted["logprobs"]), perplexity(found["logprobs"])
    change, difference = (distance(wanted["logprobs"], other) for other in (in_float, found["logprobs"]))
    equal = [
        f"{next((at for at, (one, other) in enumerate(zip(*pair, strict=False)) if one != other), len(pair[0]))}"
        for pair in zip(wanted["answers"], found["answers"], strict=True)
    ]
    passes = abs(theirs / ours - 1) < TOLERANCE and difference < change and found["good"]
    print(
        f"{scheme}: {found['layers']}; perplexity "
        f"{theirs:.3f} in vLLM, {ours:.3f} in qcompiler, {perplexity(in_float):.3f} in float; mean difference of "
        f"log-probabilities {difference:.3f}, by the quantization {change:.3f}; tokens of the answers before the first "
        f"difference {', '.join(equal)}: {'passes' if passes else 'FAILS'}",
        flush=True,
    )
    return passes


def distance(one: list[list[float]], other: list[list[float]]) -> float:
    """The mean absolute difference."""
    pairs = list(zip(chain(*one), chain(*other), strict=True))
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def perplexity(logprobs: list[list[float]]) -> float:
    """exp of the mean negative log-probability."""
    flat = list(chain(*logprobs))
    return math.exp(-sum(flat) / len(flat))


if __name__ == "__main__":
    sys.exit(main())
