"""`decoder`: compiles a causal language model for text generation.

model -> capture of whole sequences -> the scheme's passes -> `kv-cache` -> Decoder
"""

import inspect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from passes.attention.attention import Attention
from passes.attention.cache_scales import CacheScales
from passes.attention.kv_cache import CAUSAL, SCALES, is_within
from passes.attention.latent_attention import LatentAttention
from passes.sharding.part_logits import PartLogits
from passes.smoothing.smoothquant import SmoothQuant
from qcompiler.calibration import Calibration
from qcompiler.capture.preflight import check_model
from qcompiler.checkpoints.cache_scales import kept
from qcompiler.compiler.arguments import AUTO, DEFAULT_SCHEME, chosen_schemes, with_prescales
from qcompiler.compiler.compiling import compile
from qcompiler.compiler.model import CompiledModel
from qcompiler.compiler.sharded_loading import loaded, read_together
from qcompiler.compiler.sharding import ShardedModel, checked_sharding, decoder_of, together
from qcompiler.decoding.cached import POSITIONS, cache_passes
from qcompiler.decoding.decoder import Decoder
from qcompiler.decoding.lengths import LONGEST, checked_length, text_config
from qcompiler.decoding.loop import CHUNK
from qcompiler.decoding.tokenizers import check_tokenizer, generation_of, tokenizer_in
from qcompiler.errors import PassError
from qcompiler.pass_manager.instruments import Instrument
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.runtime.device import check_device, check_target, target_for
from qcompiler.schemes.named import pipeline as scheme_pipeline
from qcompiler.schemes.named import with_ignored
from qcompiler.schemes.sharded import check_whole
from qcompiler.schemes.tactics import Sharding

EXAMPLE = (2, 19)
"""Batch and length of the example call: sizes that few models fix."""

STATIC_FORMATS = get_args(get_type_hints(CacheScales)["format"])
"""Formats of a cache with static scales."""

FLOAT = "canonicalize; attention; dead-code"
"""The pipeline without a scheme."""


def decoder(
    model: "torch.nn.Module | str | PathLike[str]",
    *,
    scheme: str | None = AUTO,
    kv_cache: str | None = None,
    latent: bool = True,
    max_batch: int = 16,
    max_length: int | None = None,
    max_chunk: int = CHUNK,
    overrides: Mapping[str, str | None] | None = None,
    ignore: Sequence[str] = (),
    calibration: "Iterable[Any] | Calibration | None" = None,
    tokenizer: Any = None,
    target: str = "auto",
    device: "torch.device | str | None" = None,
    strict: bool = True,
    instruments: Sequence[Instrument] = (),
    progress: bool = True,
    mesh: Any = None,
    sharding: "Sharding | str | None" = None,
) -> Decoder:
    """Compiles a causal language model for text generation with a KV cache.

    The model is captured once, over whole sequences; the pass `kv-cache` then proves that it is causal, and makes it
    append to a cache.

    Args:
        model: A module that maps token ids to logits, or the folder of a checkpoint.
        scheme: As for `qcompiler.compile`; None quantizes no weights.
        kv_cache: The format of cached keys and values: "fp8" or "int8", with one scale per token and head; "fp8_static"
            or "int8_static", with one scale for all keys of a layer and one for all values, from the checkpoint or
            from `calibration`; None for the model's own dtype.
        latent: Whether layers whose keys and values are all computed from one latent, as in DeepSeek, cache the latent;
            else the keys and values of each head.
        max_batch: Sequences that the cache holds.
        max_length: Maximum length of a sequence in tokens, prompt included; by default 4096, or fewer if the model has
            fewer positions.
        max_chunk: Maximum number of tokens that one call computes for prompts; longer prompts are cut into chunks.
            Layers with a window of W tokens keep only the latest W - 1 + max_chunk tokens, if `max_length` is larger.
        overrides: As for `qcompiler.compile`.
        ignore: As for `qcompiler.compile`.
        calibration: As for `qcompiler.compile`.
        tokenizer: One of transformers; by default the one in the folder.
        target: As for `qcompiler.compile`.
        device: Where the model runs, such as "cuda"; by default where it is.
        strict: Whether to raise an error if nothing could be quantized; not checked without a scheme.
        instruments: As for `qcompiler.compile`.
        progress: As for `qcompiler.compile`.
        mesh: As for `qcompiler.compile`. Each rank holds the cache of its own heads. With a device mesh, all ranks must
            generate for the same prompts.
        sharding: As for `qcompiler.compile`.

    Raises:
        CaptureError: The model cannot be captured.
        PassError: It is not causal, which the message explains; or a scheme or an option is wrong.
        InputError: The cache does not fit into memory, or the model has fewer positions than `max_length`.
        QCompilerError: The folder does not contain a valid checkpoint.
    """
    check_target(target)
    check_device(device)
    checked_sharding(sharding, mesh)
    check_tokenizer(tokenizer)
    cache_passes(kv_cache, max_batch, max_length or LONGEST, max_chunk)  # errors before the model is loaded
    overrides = with_ignored(overrides, ignore)
    decoding_pipeline(DEFAULT_SCHEME if scheme == AUTO else scheme, overrides, latent)  # the same
    folder = Path(model) if isinstance(model, str | PathLike) else None
    found: Any = model if folder is None else loaded(read_together(folder, mesh), mesh, device)
    del model  # so that weights can be freed one by one
    check_model(found)
    passes = with_prescales(decoding_pipeline(*chosen_schemes(scheme, overrides, found), latent), found)
    scales = [static_scales(kv_cache, found, passes)] if kv_cache in STATIC_FORMATS else []
    if mesh is not None and folder is not None:
        check_whole(passes.append(*scales), not (calibration is None or isinstance(calibration, Calibration)))
    found = found.to(device) if device is not None and folder is None else found
    tokenizer = tokenizer_in(folder) if tokenizer is None and folder is not None else tokenizer
    length = checked_length(max_length, getattr(found, "config", None))
    generation, example = generation_of(found), example_call(found)
    options: dict[str, Any] = {
        "example_kwargs": example, "target": target, "strict": strict and scheme is not None,
        "instruments": instruments, "progress": progress,
    }  # fmt: skip
    caching = [*cache_passes(kv_cache, max_batch, length, max_chunk), *([PartLogits()] if mesh is not None else [])]
    for_target = target_for(target, next(iter(example.values())).device).passes
    if scales and mesh is not None and calibration is not None:
        scales, calibration = observed_before(mesh, found, passes, scales, calibration, options)
    steps = passes.append(*scales, *caching, for_target)
    compiled = compile(found, pipeline=steps, calibration=calibration, mesh=mesh, sharding=sharding, **options)
    del found
    if isinstance(compiled, ShardedModel):
        return decoder_of(compiled, tokenizer, generation)
    return Decoder(compiled.program, tokenizer, generation)


def observed_before(
    mesh: Any, model: Any, passes: Pipeline, scales: Sequence[CacheScales], calibration: Any, options: Mapping[str, Any]
) -> tuple[list[CacheScales], Calibration | None]:
    """Static scales of a cache, and the statistics of a model, observed on the whole model before ranks divide it."""
    (given,) = scales
    with together(mesh):
        whole = compile(model, pipeline=passes.append(given), calibration=calibration, **options)
        found, statistics = observed_scales(given, whole)
    return [found], statistics


def decoding_pipeline(
    scheme: str | None, overrides: Mapping[str, str | None] | None, latent: bool = True
) -> Pipeline:  # fmt: skip
    """Returns the passes before `kv-cache`: a scheme's passes, with attention recognized for consecutive positions.

    With `latent`, attention over keys and values that are linear in a latent becomes attention over the latent, before
    any pass that measures or quantizes the weights of these linears.

    Raises:
        PassError: The scheme is unknown, or there are overrides without a scheme.
    """
    if scheme is None and overrides is not None:
        raise PassError(
            "there are overrides, but no scheme that they override",
            got=dict(overrides),
            fix='Give scheme="fp8_tile", or none of both.',
        )
    steps = Pipeline.parse(FLOAT) if scheme is None else scheme_pipeline(scheme, overrides)
    attention = Attention(consecutive=POSITIONS, from_zero=True)
    if attention.name in steps:
        steps = steps.replace(attention.name, attention)
    elif "canonicalize" in steps:  # a scheme of another distribution
        steps = steps.insert_after("canonicalize", attention)
    else:
        steps = Pipeline((attention, *steps))
    return steps.insert_after(attention.name, LatentAttention()) if latent else steps


def static_scales(kv_cache: Any, model: Any, passes: Pipeline) -> CacheScales:
    """Returns the pass that sets the static scales of a cache: from the checkpoint of a model, or from calibration.

    It runs after the scheme, on the keys and values that the cache will hold. Smoothing changes them, so the scales of
    the checkpoint do not fit them any more.
    """
    stored = kept(model)
    if stored.format != kv_cache or SmoothQuant.name in passes:
        return CacheScales(kv_cache)
    known = tuple(f"{module} {key!r} {value!r}" for module, (key, value) in stored.by_module.items())
    return CacheScales(kv_cache, known)


def observed_scales(scales: CacheScales, whole: CompiledModel) -> tuple[CacheScales, Calibration | None]:
    """The pass with the scales of the whole model, which one rank cannot observe, and what calibration has seen."""
    ops = [op for op in whole.graph.ops(CAUSAL) if op.loc.module and not is_within(op)]
    count = Counter(op.loc.module for op in ops)
    found = {op.loc.module: [op.attrs[name] for name in SCALES] for op in ops if count[op.loc.module] == 1}
    known = tuple(f"{module} {key!r} {value!r}" for module, (key, value) in found.items())
    return replace(scales, known=known), whole.calibration


def example_call(model: Any) -> dict[str, Tensor]:
    """Returns a call with random token ids i64[2, 19], and their positions if the model takes some."""
    parameters = inspect.signature(model.forward).parameters
    name = getattr(model, "main_input_name", None) or next(iter(parameters), "input_ids")
    config = text_config(getattr(model, "config", None))
    vocabulary = getattr(config, "vocab_size", None) or 2
    ids = torch.randint(vocabulary, EXAMPLE, generator=torch.Generator().manual_seed(0))
    pad = getattr(config, "pad_token_id", None)
    if isinstance(pad, int):  # transformers warns of padding
        ids = torch.where(ids == pad, 1 - min(pad, 1), ids)
    call = {name: ids}
    if POSITIONS in parameters:
        call[POSITIONS] = torch.arange(EXAMPLE[1]).expand(EXAMPLE).contiguous()
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    return {name: tensor.to(device) for name, tensor in call.items()}
