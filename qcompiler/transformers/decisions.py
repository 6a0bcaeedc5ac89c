"""Which layers of a transformers model are quantized, decided before its weights are loaded.

The model, whose weights are on the meta device, is captured once. The rules of the compiler's quantizing passes decide
on the graph, so routers, vocabulary projections and tiny layers are found by dataflow, as in `qcompiler.compile`.

    model.layers.0.mlp.up_proj    ->    "fp8_tile"
    lm_head                       ->    skipped: it is the vocabulary projection: ...
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

from passes.analyses.layers import naming_pattern
from passes.cleanup.canonicalize import Canonicalize
from passes.quantizing.quantize import Quantize
from qcompiler.capture import capture
from qcompiler.checkpoints.layer_schemes import LayerSchemes
from qcompiler.errors import CaptureError, PassError, QCompilerError
from qcompiler.ir import Graph, Missed, Op, Role
from qcompiler.ir.dataflow import parameters_of
from qcompiler.schemes.named import pipeline, spec_of
from qcompiler.transformers.experts import expert_modules, why_not_experts

SHOWN = 3
"""Maximum number of layers in an error."""

STORED = "its folder stores it in float"
UNUSED = "the model does not use it for token ids"


@dataclass(frozen=True)
class Decisions:
    """The decision for each layer.

    Attributes:
        schemes: Module -> its scheme, as text.
        skipped: Module -> the reason why it is not quantized.
        prescaled: Modules whose input is multiplied by a factor per channel.
    """

    schemes: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    prescaled: Collection[str] = frozenset()


def decide(model: nn.Module, wanted: LayerSchemes) -> Decisions:
    """Decides for each linear layer of a model on the meta device.

    Raises:
        CaptureError: The model cannot be traced with token ids.
        PassError: A pattern does not match, a named layer cannot be quantized, or no layer can.
    """
    graph = _captured(model)
    steps = [step for step in pipeline(wanted.scheme, wanted.overrides or None) if isinstance(step, Quantize)]
    for step in steps:
        step.check_layers(graph)
        step.check_requests(graph)
    texts = [text for text in (wanted.scheme, *wanted.overrides.values()) if text is not None]
    names = {(spec.x, spec.w, spec.static): text for text in texts for spec in [spec_of(text)]}
    answers: dict[str, list[Quantize | str]] = {name: [] for name in replaceable(model)}
    for op in _readers(graph):
        layer = next(_weights(op, graph)).rpartition(".")[0]
        if op.role is Role.MATMUL:
            answers.setdefault(layer, []).append(_answer(op, layer, steps, graph, model))
        elif layer in answers:
            answers[layer].append(f"{op.name} also reads its weight")
    schemes, skipped = {}, {}
    for layer, found in answers.items():
        chosen = [names[step.x_format, step.w_format, step.static] for step in found if isinstance(step, Quantize)]
        if chosen and len(chosen) == len(found):
            schemes[layer] = chosen[0]
        else:
            skipped[layer] = next((why for why in found if isinstance(why, str)), UNUSED)
    if not schemes:
        reasons = "; ".join(f"{layer}: {why}" for layer, why in [*skipped.items()][:SHOWN])
        raise PassError("no layer of the model can be quantized", got=reasons or "no linear layer")
    return Decisions(schemes, skipped)


def stored_decisions(model: nn.Module, schemes: LayerSchemes) -> Decisions:
    """The decisions for a folder of quantized weights, by its configuration, which names modules or their files."""
    found: dict[str, str | None] = {}
    prescaled = {name for name, _ in _renamed(model, dict.fromkeys(schemes.prescaled))}
    schemes = LayerSchemes(schemes.scheme, dict(_renamed(model, schemes.overrides)))
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if wrong := sorted(prescaled - linears):
        problem = "the folder has factors of input channels for a layer that is not a linear of the model"
        raise QCompilerError(problem, got=repr(wrong[0]))
    for name in replaceable(model):
        inside = {text for layer, text in schemes.overrides.items() if layer.startswith(f"{name}.")}
        if len(inside) > 1:  # experts, whose files are one for each
            got = " and ".join(sorted(map(str, inside)))
            raise QCompilerError(f"the experts of '{name}' have different schemes", got=got, need="one for all")
        found[name] = inside.pop() if inside else schemes.of(name)
    return Decisions(
        {name: text for name, text in found.items() if text is not None},
        {name: STORED for name, text in found.items() if text is None},
        prescaled,
    )


def _renamed(model: Any, overrides: Mapping[str, str | None]) -> Iterator[tuple[str, str | None]]:
    """The overrides, with the names that transformers gives to modules when it reads files."""
    renamings = get_model_conversion_mapping(model)
    for layer, text in overrides.items():
        name = f"{layer}."  # renamings are written for names of weights
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        yield name.removesuffix("."), text


def _captured(model: Any) -> Graph:
    """The graph of a model for token ids, with one spelling of each matmul."""
    if model.main_input_name != "input_ids":
        fix = "Use qcompiler.compile, which takes example inputs."
        raise CaptureError("only models of token ids are quantized while they load", got=model.main_input_name, fix=fix)
    training = model.training
    inputs = {name: value.to("meta") for name, value in model.dummy_inputs.items()}  # no rule depends on their sizes
    try:
        with torch.device("cpu"):  # transformers builds models under the meta device, which would apply to the trace
            graph = capture(model.eval(), (), inputs, dynamic_shapes=None, check=False, allow_meta=True).graph
    finally:
        model.train(training)
    Canonicalize().run(graph)
    return graph


def _readers(graph: Graph) -> Iterator[Op]:
    """The operations that read both inputs and weights."""
    for op in graph.ops():
        if op.results and not graph.is_constant(op.results[0]) and any(_weights(op, graph)):
            yield op


def _weights(op: Op, graph: Graph) -> Iterator[str]:
    """The names of the parameters that constant operands are computed from, without biases and the like."""
    for _, value in op.operands():
        if graph.is_constant(value):
            matrices = (param for param in parameters_of(value) if len(param.result.tensor.shape) > 1)
            yield from (str(param.attrs["name"]) for param in matrices)


def _answer(op: Op, layer: str, steps: Sequence[Quantize], graph: Graph, model: nn.Module) -> Quantize | str:
    """The pass that quantizes a matmul, or the reason why none does."""
    reasons = []
    for step in steps:
        matches = [rule.match(op, graph) for rule in step.rules() if rule.starts_at(op)]
        if any(not isinstance(match, Missed) for match in matches):
            why = _why_not_called(op, layer, {*_weights(op, graph)}) or _why_not_module(model, layer, step)
            if why is None:
                return step
            if pattern := naming_pattern(step.layers, op, graph):
                raise PassError(f"the layer that '{pattern}' names cannot be quantized", got=f"{layer}: {why}")
            return why
        reasons += [str(match) for match in matches]
    return next((why for why in reasons if not why.startswith("the pattern")), reasons[0])


def _why_not_called(op: Op, layer: str, weights: set[str]) -> str | None:
    """Why a matmul is not a call of the module that holds its weight; None if it is one."""
    if len(weights) > 1:
        return f"its weight is computed from several parameters: {', '.join(sorted(weights))}"
    return (
        None if op.loc.module == layer else f"its weight is multiplied in {op.loc.module or 'the model'}, outside of it"
    )


def _why_not_module(model: nn.Module, layer: str, step: Quantize) -> str | None:
    """Why the module of a layer cannot be replaced; None if it can."""
    module = model.get_submodule(layer)
    if type(module) is not nn.Linear:
        return why_not_experts(module, step.w_format.block[0])
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    others = {name for pair in tied.items() if f"{layer}.weight" in pair for name in pair} - {f"{layer}.weight"}
    return f"it shares its weight with {', '.join(sorted(others))}" if others else None


def replaceable(model: nn.Module) -> Iterator[str]:
    """The names of the modules that can hold codes, used or not."""
    yield from (name for name, module in model.named_modules() if type(module) is nn.Linear)
    yield from (name for name, _ in expert_modules(model))
