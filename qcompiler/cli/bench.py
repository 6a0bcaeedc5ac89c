"""`qcompiler bench`: measures call latency of an artefact on its device."""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from qcompiler.capture.signature import ConstantSlot, Signature
from qcompiler.cli import bench_decoding
from qcompiler.cli.inputs import Call, random_call
from qcompiler.cli.meshes import load_artefact
from qcompiler.cli.models import load_model
from qcompiler.cli.output import print_json, print_table
from qcompiler.compiler.sizing import calls_of_rows
from qcompiler.decoding.decoder import Decoder
from qcompiler.errors import InputError
from qcompiler.ir import TensorType
from qcompiler.program.exporters import exported_at
from qcompiler.progress import Progress

USUAL_ROWS = (1, 16, 512)
WARM_UP = 3
"""Warm-up calls that are not timed: they compile kernels and fill caches."""

QUANTIZED, AGAINST = "artefact", "against"


def run(options: argparse.Namespace) -> int:
    """Measures latency, or tokens per second of a decoder, and prints a table."""
    if options.decode:
        return bench_decoding.run(options)
    progress = Progress(shown=not options.quiet)
    with progress.showing(), torch.inference_mode():
        progress.stage("loading")
        compiled, signature = _subject(options)
        device = signature.device or torch.device("cpu")
        models = {QUANTIZED: compiled}
        if options.against is not None:
            models[AGAINST] = _other(options.against, device)
        progress.stage("measuring")
        rows = []
        for call in _calls(signature, options):
            progress.tell(f"measuring {_shapes(call)}")
            times = _milliseconds(models, call.on(device), options.repeats, device)
            rows.append({"inputs": _types(call), "repeats": options.repeats, "milliseconds": times})
    document = {"artefact": options.artefact, "against": options.against, "device": _device(device),
                "versions": _versions(), "calls": rows}  # fmt: skip
    print_json(document) if options.json else _print(document)
    return 0


# Calls


def _subject(options: argparse.Namespace) -> tuple[Callable[..., Any], Signature]:
    """The model to time and its signature: an artefact, or a folder that an exporter wrote."""
    folder = Path(options.artefact)
    if (written := exported_at(folder)) is not None:
        return written[1].load(), written[1].signature()
    compiled = load_artefact(folder, trust=options.trust)
    if isinstance(compiled, Decoder):
        raise InputError("the artefact is a decoder", got=options.artefact, fix="Measure it with --decode 1,4,16.")
    return compiled, compiled.signature


def _other(name: str, device: torch.device) -> Callable[..., Any]:
    """The model to compare with. Calls raise InputError if its signature does not match the artefact's."""
    found = load_model(name, str(device)).model
    model = found.module() if isinstance(found, ExportedProgram) else found

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return model(*args, **kwargs)
        except Exception as error:  # another model's code may fail in any way
            got = f"{name}: {type(error).__name__}: {error}"
            need = "the original model, or one with the same signature"
            raise InputError("the model to compare with does not accept the call", got=got, need=need) from error

    return call


def _calls(signature: Signature, options: argparse.Namespace) -> Iterator[Call]:
    """The calls to time, of different sizes."""
    if options.input:
        yield random_call(options.input)
        return
    seen = set()
    for count in options.rows or USUAL_ROWS:
        call = _call_of_rows(signature, count)
        if (shapes := _shapes(call)) not in seen:  # sizes may be bounded, or all fixed
            seen.add(shapes)
            yield call


def _call_of_rows(signature: Signature, count: int) -> Call:
    """A call with `count` rows of normal random numbers; integers are ones, valid as ids and masks."""
    generator = torch.Generator().manual_seed(0)
    values = iter(calls_of_rows(signature, [count])[0])

    def drawn(blank: Any) -> Any:
        if not hasattr(blank, "shape"):
            return blank
        if blank.dtype.is_floating_point or blank.dtype.is_complex:
            return torch.randn(blank.shape, generator=generator).to(blank.dtype)
        return torch.ones(blank.shape, dtype=blank.dtype)

    leaves = [slot.value if isinstance(slot, ConstantSlot) else drawn(next(values)) for slot in signature.slots]
    args, kwargs = pytree.tree_unflatten(leaves, signature.in_spec)
    return Call(tuple(args), dict(kwargs))


def _types(call: Call) -> dict[str, str]:
    """Types of a call's tensors by argument, such as `f32[16, 256]`."""
    found = {str(place): value for place, value in enumerate(call.args)} | call.kwargs
    return {name: str(kind) for name, value in found.items() if (kind := TensorType.of(value)) is not None}


def _shapes(call: Call) -> str:
    return ", ".join(f"{name}: {kind}" for name, kind in _types(call).items())


# Timing


def _milliseconds(
    models: Mapping[str, Callable[..., Any]], call: Call, repeats: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Median and minimum time per call of each model; models alternate because device clocks may change."""
    for model in models.values():
        for _ in range(WARM_UP):
            model(*call.args, **call.kwargs)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            _wait(device)
            start = time.perf_counter()
            model(*call.args, **call.kwargs)
            _wait(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: {"median": statistics.median(each), "least": min(each)} for name, each in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Output


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU with {capability}, {torch.get_num_threads()} threads"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("qcompiler", "torch", "triton", "iree-base-runtime"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # triton exists only on Linux, and IREE is optional
            continue
    return found


def _print(document: dict[str, Any]) -> None:
    compared = document["against"] is not None
    headings = ["inputs", "median ms ", "min ms ", *(["against, median ms ", "ratio "] if compared else [])]
    rows = []
    for call in document["calls"]:
        own = call["milliseconds"][QUANTIZED]
        cells = [", ".join(f"{name}: {kind}" for name, kind in call["inputs"].items())]
        cells += [f"{own['median']:.3f}", f"{own['least']:.3f}"]
        if compared:
            other = call["milliseconds"][AGAINST]["median"]
            cells += [f"{other:.3f}", f"{own['median'] / other:.2f}"]
        rows.append(cells)
    print_table(headings, rows)
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    print(f"{document['device']}; {versions}; {document['calls'][0]['repeats']} calls of each size")
