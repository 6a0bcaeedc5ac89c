"""Parsers of untrusted texts and files: each target is a function of bytes with valid example inputs.

A target returns or raises QCompilerError; results must also survive a print-and-parse round-trip.
"""

import atexit
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch

import qcompiler.schemes.named
from qcompiler import knobs
from qcompiler.calibration import Calibration
from qcompiler.calibration.store import KEY
from qcompiler.dialects import fused_expression
from qcompiler.ir import Graph, parse_literal, print_argument
from qcompiler.pass_manager.pipeline import PASSES, Pass, Pipeline
from qcompiler.schemes.named import SCHEMES
from qcompiler.testing import random_graph

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        read: Reads one input.
        seeds: Valid inputs, shortest first.
        words: Words of its language.
    """

    read: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...] = ()


def text_of(given: bytes) -> str:
    """The content of a text file with these bytes; invalid UTF-8 is replaced."""
    return given.decode("utf-8", "replace")


def same(made: object, again: object) -> None:
    """Checks that parsing the printed text gives the same value."""
    if str(made) != str(again):
        raise AssertionError(f"it prints as\n{made}\nwhich reads as\n{again}")


def read_graph(given: bytes) -> None:
    """The graph IR's text, and the verifier."""
    graph = Graph.parse(text_of(given))
    same(graph, Graph.parse(str(graph)))
    graph.verify()


def read_pipeline(given: bytes) -> None:
    """The text of a pipeline."""
    pipeline = Pipeline.parse(text_of(given))
    same(pipeline, Pipeline.parse(str(pipeline)))


def read_pass(given: bytes) -> None:
    """The text of a pass."""
    step = Pass.parse(text_of(given))
    same(step, Pass.parse(str(step)))


def read_scheme(given: bytes) -> None:
    """The text of a scheme with options."""
    pipeline = qcompiler.schemes.pipeline(text_of(given))
    same(pipeline, Pipeline.parse(str(pipeline)))


def read_layers(given: bytes) -> None:
    """A scheme for the layers that a pattern selects."""
    pattern, _, scheme = text_of(given).partition("=")
    pipeline = qcompiler.schemes.pipeline("fp8_tile", {pattern: scheme or None})
    same(pipeline, Pipeline.parse(str(pipeline)))


def read_size(given: bytes) -> None:
    """A size in the text of a type, through a graph with an input of that type."""
    graph = Graph.parse(f"func @f(%x: f32[{text_of(given)}]) -> () {{ return }}")
    same(graph, Graph.parse(str(graph)))


def read_literal(given: bytes) -> None:
    """A literal of the graph IR, such as an option's value."""
    text = print_argument(parse_literal(text_of(given)))
    same(text, print_argument(parse_literal(text)))


def read_expression(given: bytes) -> None:
    """The fused expression of an operation."""
    made = fused_expression.parse(text_of(given))
    same(made, fused_expression.parse(str(made)))


def read_knobs(given: bytes) -> None:
    """The environment: one NAME=value per line."""
    pairs = (line.partition("=") for line in text_of(given).splitlines())
    knobs.table(knobs.Knobs.from_environment({name: value for name, _, value in pairs}))


def read_calibration(given: bytes) -> None:
    """A calibration file."""
    path = folder() / "calibration.safetensors"
    path.write_bytes(given)
    Calibration.load(path)


def read_calibration_head(given: bytes) -> None:
    """A calibration file with valid tensors and an invalid description."""
    header = json.loads(header_of(_calibration_file()))
    header["__metadata__"][KEY] = text_of(given)
    read_calibration(with_header(_calibration_file(), json.dumps(header).encode("utf-8")))


def header_of(data: bytes) -> bytes:
    """The header of a safetensors file."""
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def with_header(data: bytes, header: bytes) -> bytes:
    """A safetensors file with another header."""
    return len(header).to_bytes(8, "little") + header + data[8 + len(header_of(data)) :]


@cache
def folder() -> Path:
    """A folder for the current file, in memory if possible; deleted when Python exits."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="qcompiler-fuzz-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _calibration_file() -> bytes:
    graph = Graph.parse("func @m(%x: f32[s0, 2]) -> (f32[s0, 2]) {\n  %y = aten.relu(%x) : f32[s0, 2]\n  return %y\n}")
    calibration = Calibration([[torch.linspace(-1, 3, 8).reshape(4, 2)]])
    calibration.observe(graph, ["x", "y"], rows=2, progress=False)
    calibration.save(folder() / "seed.safetensors")
    return (folder() / "seed.safetensors").read_bytes()


def _calibration_text() -> bytes:
    return str(json.loads(header_of(_calibration_file()))["__metadata__"][KEY]).encode("utf-8")


def _goldens() -> Iterator[str]:
    """Each case of a golden file: its pipeline, its graph, and what the graph becomes."""
    for path in sorted((ROOT / "tests/passes/golden").glob("*.qir")):
        yield from re.split(r"^// ----- .+\n", path.read_text(encoding="utf-8"), flags=re.M)[1:]


def _graphs() -> Iterator[str]:
    yield "func @f(%x: bf16[s0, 2]) -> (bf16[s0, 2]) where s0 in 1..4 {\n  return %x\n}"
    yield from (str(random_graph(seed, size=4)) for seed in range(8))
    yield from (text.partition("\n}\n")[0] + "\n}\n" for text in _goldens())


def _pipelines() -> Iterator[str]:
    yield from (scheme.pipeline for scheme in SCHEMES.values())
    yield from (text.split("\n", 1)[0].removeprefix("// RUN: ") for text in _goldens())
    e5m2 = '#format<f8e5m2, block = [1, 64], profile = "deepgemm">'
    yield f'fp8-tile{{x_format={e5m2}, w_format=#nvfp4, layers=["*", "!lm_head"]}}; dead-code'


def _schemes() -> Iterator[str]:
    yield from SCHEMES
    yield "smoothquant_o3{alpha=0.5, pow2=true, observer=percentile, percentile=99.9}"
    yield "fp8_tile{k_block=64, dtype=f8e5m2, numerics=deepgemm}"


def _expressions() -> Iterator[str]:
    yield from ("x0", "bf16(x0 + x1)", "t0 = bf16(y0); bf16(bf16(tanh(t0)) + t0)", "neg(x0) / (-2.5 - x1 * 1e-06)")
    yield from re.findall(r'expression = "([^"]+)"', "".join(_goldens()))
    yield from re.findall(r'"([^"]*x0\[[^"]+)"', "".join(_goldens()))


SIZES = (
    "s0",
    "2*s0 + 1",
    "s0*s1",
    "floordiv(s0 + 127, 128)",
    "max(s0, s1, 4)",
    "mod(-s0, 3)",
    "pow(s0, 2)",
    "pow(2, s0) - 3*s1*s2",
)
LITERAL_TEXTS = ("None", "-2", "1e-05", "[1, [2, -1], true]", '"a\\n\\u00e9"', "bf16", "#contiguous_format", "inf")
PATTERNS = ("*.down_proj=fp8_row", "lm_head=", "layers.[0-9].*=fp8_tile{k_block=64}")
ENVIRONMENT = (
    "QCOMPILER_TIME_PASSES=1\nQCOMPILER_DUMP_DIR=~/graphs\nPATH=/bin",
    "QCOMPILER_PRINT_AFTER=all,fp8-tile\nQCOMPILER_UPDATE=off\nQCOMPILER_CACHE_DIR=\nQCOMPILER_TUNED=yes",
)


def in_order(seeds: Iterable[bytes]) -> tuple[bytes, ...]:
    """Each seed once, shortest first."""
    return tuple(sorted(set(seeds), key=lambda seed: (len(seed), seed)))


def _seeds(texts: Iterable[str]) -> tuple[bytes, ...]:
    return in_order(text.encode("utf-8", "surrogatepass") for text in texts)


def _words(*texts: str) -> tuple[bytes, ...]:
    return tuple(text.encode() for text in texts)


OPTIONS = _words(*sorted({option.name for kind in PASSES.values() for option in fields(kind)}), *PASSES, "deepgemm")
JSON_WORDS = _words('"version"', '"values"', "true", "NaN", "1e999", '"name"', "0.absmax", "-1", '"F64"', '"BF16"')

TEXT_TARGETS = {
    "graph": Target(
        read_graph,
        _seeds(_graphs()),
        _words("core.param", "core.update", "quant.linear", "aten.add.Tensor", "int(s0)", "s0", "u0", "loc(", "%x"),
    ),
    "size": Target(read_size, _seeds(SIZES), _words("floordiv(", "mod(", "max(", "min(", "pow(", "f(", "s0", "//")),
    "literal": Target(read_literal, _seeds(LITERAL_TEXTS), _words("f8e4m3fn", "1e400", "-inf")),
    "expression": Target(
        read_expression,
        _seeds(_expressions()),
        _words(
            "x0",
            "y0",
            "standardize(",
            "where(i0 < 2, ",
            "mean(",
            "lambda",
            "if",
            "1e39",
            "x1[i0, ",
            "mod(",
            "floordiv(",
        ),
    ),
    "pipeline": Target(read_pipeline, _seeds(_pipelines()), OPTIONS),
    "pass": Target(read_pass, _seeds(text for line in _pipelines() for text in line.split("; ")), OPTIONS),
    "scheme": Target(read_scheme, _seeds(_schemes()), OPTIONS),
    "layers": Target(read_layers, _seeds(PATTERNS), _words("*", "!", "**", "[", "fp8_row")),
    "knobs": Target(read_knobs, _seeds(ENVIRONMENT), _words("QCOMPILER_", "on", "~unknown", "~")),
    "calibration": Target(read_calibration, (_calibration_file(),), JSON_WORDS),
    "calibration-head": Target(read_calibration_head, (_calibration_text(),), JSON_WORDS),
}
