"""Writes a compiled model as a checkpoint with the original model's names and configuration."""

from os import PathLike

from torch import nn

from passes.analyses.candidates import why_skipped
from qcompiler.checkpoints.cache_scales import SCHEME, calibrated, kept
from qcompiler.checkpoints.conversion import to_files
from qcompiler.checkpoints.folders import CONFIG, check_place, write_folder
from qcompiler.checkpoints.format import Writer, stores_prescales, writer_called
from qcompiler.checkpoints.loading import load_model
from qcompiler.checkpoints.origin import Origin, origin_of_module
from qcompiler.checkpoints.provenance import Provenance, trace
from qcompiler.checkpoints.quantized_weight import QuantizedWeight, equal_bits
from qcompiler.checkpoints.readers import ANY, Written, check_reader
from qcompiler.checkpoints.stacking import unstacked
from qcompiler.errors import QCompilerError
from qcompiler.ir.dataflow import parameters_of
from qcompiler.ir.graph import PARAM
from qcompiler.program.folder_kinds import checked_path
from qcompiler.program.program import HasProgram, Program
from qcompiler.report.report import unfused

SHARD_BYTES = 5 * 10**9

LEAVE = "Skip these when you compile: overrides={name: None}; compiled.save stores any model."
"""Advice for weights that no format can store."""


PRESCALED = "its input is multiplied by smoothing's factor of each channel, which cannot be folded into a weight"
"""Why formats of other tools cannot store a weight."""


def write(
    compiled: HasProgram,
    folder: "str | PathLike[str]",
    format: str,
    *,
    model: "nn.Module | str | PathLike[str] | None" = None,
    reader: str | None = ANY,
    scale_format: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a compiled model as a checkpoint under the names of the original model's weights.

    Quantized weights are written with the exact codes and scales of the compiled graph; others as in the model.

    Args:
        compiled: The result of `qcompiler.compile`.
        folder: The folder to write; an existing checkpoint is replaced, other content is an error.
        format: "fp8" (Hugging Face's block FP8), "compressed-tensors", "qcompiler" for any scheme, or "float" for a
            model without quantized weights, such as one that is only smoothed.
        model: The original model or its folder. Required if the model no longer exists in memory, and always for the
            result of `qcompiler.load`.
        reader: The tool that will read the checkpoint: "vllm", "transformers", or "any". Layers that it cannot read or
            would change are an error. None writes all that the format can store.
        scale_format: How "fp8" stores scales: "float", or "ue8m0", one byte, for powers of two. By default, the format
            of the model's own scales, or else "float".
        shard_bytes: Maximum size of a file in bytes; a larger checkpoint is split.

    Raises:
        QCompilerError: The format cannot store some layers, or the reader cannot read some, which the error lists; or
            the folder is not a checkpoint.
    """
    target = checked_path(folder)
    writer_called(format, scale_format or "float")
    check_place(target)
    program = compiled.program
    found = trace(unfused(program.stages.values())[-1], program.graph, _parameters(program))
    origin = _origin(program.original.again() if model is None else model, found)
    if origin.folder is not None and target.exists() and target.samefile(origin.folder):
        raise QCompilerError("the model is read from this very folder", got=str(target), fix="Write to another one.")
    writer = writer_called(format, scale_format or _scale_format(origin, found))
    weights = _weights(origin, found)
    _check(format, writer, weights, found)
    unconverted = _unconverted(origin, weights, program)
    check_reader(reader, Written(writer, weights, unconverted, _named_layers(program)))
    plain = {name: found.changed.get(name, tensor) for name, tensor in origin.tensors.items()}
    left = {name: tensor for name, tensor in plain.items() if name not in found.scales | found.quantized.keys()}
    tensors = to_files(origin.module, left)
    for name, weight in weights.items():
        tensors |= writer.tensors(name, weight)
    documents = dict(origin.documents)
    if config := writer.config(weights, unconverted):
        cache = kept(origin.module) or calibrated(program)
        tensors |= cache.tensors
        config |= {SCHEME: cache.scheme} if cache.scheme is not None else {}
        documents[CONFIG] = {**documents.get(CONFIG, {}), "quantization_config": config}
    write_folder(target, tensors, documents, origin.folder, shard_bytes)


def _parameters(program: Program) -> set[str]:
    return {str(op.attrs["name"]) for op in program.stages["captured"].ops(PARAM)}


def _origin(given: object, found: Provenance) -> Origin:
    """Checks that a model has the weights of the compiled one, and returns its origin."""
    module = load_model(given) if isinstance(given, str | PathLike) else given
    if not isinstance(module, nn.Module):
        problem = "the original model no longer exists"
        if module is not None:
            problem = f"a checkpoint needs a module, but this was compiled from a {type(module).__name__}"
        raise QCompilerError(problem, fix="Pass the module or its folder, or one with the same weights: model=...")
    origin = origin_of_module(module)
    for twin in origin.twins.keys() & found.quantized.keys():
        found.quantized[origin.twins[twin]] = found.quantized.pop(twin)
    if missing := sorted({*found.quantized, *found.changed} - {*origin.tensors}):
        got = f"no weight '{missing[0]}' in {type(module).__name__}"
        raise QCompilerError("this is not the model that was compiled", got=got, need="one with the same weights")
    for name, tensor in found.kept.items():
        if tensor is not None and name in origin.tensors and not equal_bits(origin.tensors[name], tensor):
            got = f"other numbers in '{name}'"
            raise QCompilerError("this is not the model that was compiled", got=got, need="one with the same weights")
    found.spread(origin.ties)
    for name, how in origin.stored().items():
        found.scales.update(how.beside)
        if name not in found.quantized and name not in origin.twins:  # the graph does not use it
            found.quantized[name] = origin.quantized(name, how)
    return origin


def _scale_format(origin: Origin, found: Provenance) -> str:
    """The format of the model's own scales."""
    bytes_each = {origin.tensors[name].itemsize for name in found.scales if name in origin.tensors}
    return "ue8m0" if bytes_each == {1} else "float"


def _weights(origin: Origin, found: Provenance) -> dict[str, QuantizedWeight]:
    """Quantized weights by their names in the files; records weights that cannot be converted."""
    weights: dict[str, QuantizedWeight] = {}
    linears = {*origin.linears()}
    for name, weight in found.quantized.items():
        if weight.codes.dim() == 2 and not (name.endswith("weight") and _module(name) in linears):
            found.refuse(name, "it is not the weight of a linear module, which is what readers of the format look for")
            continue
        try:
            weights |= unstacked(origin.module, name, weight, origin.is_whole(name))
        except QCompilerError as error:
            found.refuse(name, str(error))
    return weights


def _check(name: str, writer: Writer, weights: dict[str, QuantizedWeight], found: Provenance) -> None:
    """Raises QCompilerError that lists every weight that the format cannot store, and why."""
    refused = dict(found.refused)
    for weight_name, weight in weights.items():
        if weight.prescale is not None and not stores_prescales(name):
            refused.setdefault(weight_name, PRESCALED)
        elif why := writer.why_not(weight):
            refused.setdefault(weight_name, why)
    if refused:
        rows = "".join(f"\n  {weight}: {why}" for weight, why in sorted(refused.items()))
        problem = f"the format '{name}' cannot hold {len(refused)} of the weights:{rows}"
        prescaled = PRESCALED in refused.values()
        raise QCompilerError(
            problem, fix=LEAVE if found.refused else 'Use format="qcompiler".' if prescaled else writer.fix
        )
    if name != "float" and not weights:
        raise QCompilerError("nothing is quantized", got="a graph in float", fix='Use format="float".')


def _named_layers(program: Program) -> set[str]:
    """Weights of layers that are quantized only when named."""
    stages = program.stages
    graph = stages["canonicalize" if "canonicalize" in stages else "captured"]
    skipped = (op for op in graph.ops("aten.linear") if graph.is_constant(op["weight"]) and why_skipped(op, graph))
    return {str(param.attrs["name"]) for op in skipped for param in parameters_of(op["weight"])}


def _unconverted(origin: Origin, weights: dict[str, QuantizedWeight], program: Program) -> set[str]:
    """Names of the linears that readers must keep in float, and of other matmuls that some readers treat as linears."""
    alone = {name for row in program.report.skipped for name in row.weights if name in origin.tensors}
    files = to_files(origin.module, {name: origin.tensors[name] for name in alone})
    names = {*origin.linears(), *map(_module, alone), *map(_module, files)}
    return {name for name in names if name} - {_module(name) for name in weights}


def _module(weight: str) -> str:
    return weight.rpartition(".")[0]
