"""The command-line parser: each command, its arguments, and the module that runs it.

This module imports little more than argparse, so that help, usage errors and completion never wait for torch.
"""

import argparse
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pkgutil import iter_modules

from qcompiler.entry_points import CHECKPOINTS, EXPORTERS, offered

COMMANDS = {
    name: f"qcompiler.cli.{module}"
    for name, module in {
        "compile": "compile", "inspect": "inspect", "report": "report", "check": "check", "bench": "bench",
        "generate": "generate", "export": "export", "explain": "explain", "passes": "catalogue", "schemes": "catalogue",
        "opt": "opt", "completion": "completion",
    }.items()
}  # fmt: skip
"""Command -> module that runs it."""

MLIR = {"mlir-torch": "torch", "mlir-linalg": "linalg"}
WRITTEN = sorted(
    found.name.replace("_", "-") for found in iter_modules([str(Path(__file__).parents[1] / "checkpoints" / "formats")])
)
"""Our checkpoint formats that can be written, by the names of their files: importing them would load torch."""

MODEL = (
    "an exported program (.pt2), a Hugging Face model folder, or module:factory, a function without arguments that "
    "returns a model, or a model and its example inputs; .pt2 files and factories run code: use only trusted ones"
)
SCHEME = 'a scheme, with optional options in braces: "fp8_tile{k_block=64}"'
PIPELINE = 'passes instead of a scheme: "canonicalize; fp8-tile; dead-code"'
OVERRIDE = (
    'another scheme for layers whose weights match a pattern, "*.down_proj=fp8_row", or none to skip them; may be '
    "given several times, and the last match wins"
)
CHECKPOINT = (
    f"{', '.join(WRITTEN[:-1])} or {WRITTEN[-1]} (fp8 is Hugging Face's block FP8, float is for a model that is only "
    "smoothed)"
)
NO_READER = "none"
"""The choice of `--reader` that checks nothing."""

IGNORE = "skip layers whose weights match a pattern, such as lm_head; may be given several times"
INPUT = (
    'random data for one argument: "x=bf16[4,256]", or "ids=i64[1,16] in 0..30521" with a range of integers (default: '
    "0 and 1); once per argument"
)


class Parser(argparse.ArgumentParser):
    """A parser with `--debug` in all commands; abbreviated options are errors, since options may be added."""

    def __init__(self, **keywords: object) -> None:
        super().__init__(allow_abbrev=False, **keywords)  # type: ignore[arg-type]  # argparse's own keywords
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; it sets `command` to the name of the given command."""
    parser = Parser(prog="qcompiler", description="A quantization compiler for PyTorch models.")
    parser.set_defaults(debug=False)
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (says, add) in _ARGUMENTS.items():
        add(commands.add_parser(name, help=says, description=_sentence(says)))
    return parser


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


class _Version(argparse.Action):
    """Prints the version, which is looked up only on request."""

    def __init__(self, option_strings: list[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        try:
            print(f"qcompiler {version('qcompiler')}")
        except PackageNotFoundError:
            print("qcompiler 0+unknown")
        parser.exit()


# Shared arguments


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def _quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", "-q", action="store_true", help="show no progress")


def _artefact(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artefact", metavar="DIR", help="a folder that `qcompiler compile` wrote")
    _trust(parser)


def _example(parser: argparse.ArgumentParser) -> None:
    example = parser.add_mutually_exclusive_group()
    example.add_argument("--input", action="append", default=[], metavar="NAME=TYPE", help=INPUT)
    example.add_argument("--example", metavar="FILE", help="a .safetensors file with the arguments of one call: "
                         "tensors by name, or by position (0, 1, ...)")  # fmt: skip


def _mesh(parser: argparse.ArgumentParser, which: str) -> None:
    parser.add_argument(
        "--mesh", metavar="AXES", help=f"{which}divide the model among ranks: tp=2, or dp=2,tp=4 for several axes"
    )
    parser.add_argument(
        "--sharding", metavar="TACTICS", help='with --mesh, how to divide it, such as "tp; sp; ep" (default: tp)'
    )


def _trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust", action="append", default=[], metavar="NAMESPACE",
        help="a namespace of operators, besides torch's own, that the graph may call; may be given several times",
    )  # fmt: skip


def _sizes(text: str) -> list[int]:
    """`1,16,512`"""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}; need positive numbers, such as 1,16,512")
    return [int(part) for part in parts]


def checkpoint_formats() -> list[str]:
    """The names of all checkpoint formats that can be written."""
    return [*WRITTEN, *sorted({*offered(CHECKPOINTS)} - {*WRITTEN})]


def _form(text: str) -> str:
    """A format that `export` writes."""
    known = (*MLIR, *checkpoint_formats(), *sorted(offered(EXPORTERS)))
    if text not in known:
        raise argparse.ArgumentTypeError(f"got {text!r}; need one of {', '.join(known)}")
    return text


def _count(text: str) -> int:
    """A positive integer."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; need a positive integer")
    return int(text)


# The commands, in the order of the help text


def _compile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument(
        "--output",
        "-o",
        metavar="DIR",
        required=True,
        help="the folder to write: new, empty, or an artefact to replace",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--scheme", "-s", help=f"{SCHEME} (default: fp8_tile)")
    which.add_argument("--pipeline", "-p", help=PIPELINE)
    parser.add_argument("--override", action="append", default=[], metavar="PATTERN=SCHEME", help=OVERRIDE)
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help=IGNORE)
    _example(parser)
    parser.add_argument(
        "--calibration", action="append", default=[], metavar="FILE",
        help="calibration data: a .safetensors file with the arguments of one call, or of several as 0.name, 1.name, "
        "...; or, for a Hugging Face folder with a tokenizer, a text file with one sample per line; may be given "
        "several times",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=_count, default=8, metavar="N", help="lines of text per batch (default: 8)"
    )
    parser.add_argument(
        "--max-length", type=_count, default=512, metavar="N", help="maximum tokens per line (default: 512)"
    )
    parser.add_argument(
        "--target",
        default="auto",
        help='"auto" (by device, the default), "cpu", "sm_90a", "cuda", or "iree-cpu", a folder that IREE runs',
    )
    parser.add_argument("--device", help='where to compile: "cpu" or "cuda" (default: where the model is)')
    parser.add_argument("--fixed-sizes", action="store_true", help="fix all sizes to the example's")
    parser.add_argument(
        "--checkpoint", action="append", default=[], metavar="FORMAT=DIR",
        help=f"also write a checkpoint for other engines, in the format {CHECKPOINT}; may be given several times",
    )  # fmt: skip
    _mesh(parser, "")
    parser.add_argument("--allow-unquantized", action="store_true", help="succeed even if nothing is quantized")
    _quiet(parser)
    _json(parser)


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="an artefact, a folder of dumped graphs, or a .qir file")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--stage", metavar="NAME", help="print the graph after the pass of this name")
    what.add_argument("--diff", nargs=2, metavar=("A", "B"), help="print the difference between two stages")
    what.add_argument(
        "--op", metavar="NAME", help="print the history of one operation, or of all operations of a module, by pass"
    )
    what.add_argument("--source", action="store_true", help="print the generated host module")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--no-locations", action="store_true", help="omit locations from the graph of --stage")
    text.add_argument("--dot", action="store_true", help="print the graph of --stage as Graphviz DOT")
    _json(parser)


def _report(parser: argparse.ArgumentParser) -> None:
    _artefact(parser)
    parser.add_argument("--html", metavar="FILE", help="write an HTML page, with the graphs of all stages")
    parser.add_argument("--against", metavar="MODEL", help=f"add the error of each layer on one call: {MODEL}")
    parser.add_argument(
        "--outputs", action="store_true",
        help="with --against, add the error of the model's outputs if only one layer is quantized, for each layer",
    )  # fmt: skip
    _example(parser)
    _json(parser)


def _check(parser: argparse.ArgumentParser) -> None:
    _artefact(parser)
    _json(parser)


def _bench(parser: argparse.ArgumentParser) -> None:
    _artefact(parser)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--rows", type=_sizes, metavar="N,N,...", help="numbers of rows, such as tokens (default: 1,16,512)"
    )
    sizes.add_argument("--input", action="append", default=[], metavar="NAME=TYPE", help=INPUT)
    sizes.add_argument(
        "--decode",
        type=_sizes,
        metavar="N,N,...",
        help="for a decoder, numbers of sequences: measure tokens per second",
    )
    parser.add_argument(
        "--context", type=_count, default=128, metavar="N", help="tokens of each prompt, for --decode (default: 128)"
    )
    parser.add_argument("--repeats", type=_count, default=20, metavar="N", help="timed calls per size (default: 20)")
    parser.add_argument("--against", metavar="MODEL", help=f"also time an unquantized model: {MODEL}")
    _quiet(parser)
    _json(parser)


def _generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a decoder's artefact, or a Hugging Face model folder")
    parser.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT",
        help="the text to continue, or - for standard input; may be given several times",
    )  # fmt: skip
    parser.add_argument("--chat", action="store_true", help="send each prompt as a chat message to the model")
    parser.add_argument(
        "--max-new-tokens", type=_count, metavar="N", help="maximum number of new tokens (default: 256)"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="sample (default: take the most likely token)")
    parser.add_argument("--top-k", type=_count, metavar="K", help="sample from the K most likely tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the tokens that make up this probability")
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="sample from tokens at least P times as likely as the most likely one"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="make repeated tokens less likely, if above 1"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the seed of sampling (default: 0)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="continue after the end of the text")
    parser.add_argument(
        "--scheme", "-s", help=f"for a folder, {SCHEME}, or none (default: the folder's own, or fp8_tile)"
    )
    parser.add_argument(
        "--kv-cache",
        metavar="FORMAT",
        help="for a folder, the format of the cache: fp8, int8 or fp8_static (default: the model's own)",
    )
    parser.add_argument(
        "--max-length", type=_count, metavar="N", help="for a folder, tokens of a prompt and its answer (default: 4096)"
    )
    _mesh(parser, "for a folder, ")
    parser.add_argument("--device", help='where to run: "cpu" or "cuda" (default: cpu, or where the artefact was made)')
    parser.add_argument("--save", metavar="DIR", help="also save the decoder as an artefact")
    _trust(parser)
    _quiet(parser)


def _export(parser: argparse.ArgumentParser) -> None:
    _artefact(parser)
    parser.add_argument(
        "--to", required=True, type=_form, metavar="FORM",
        help=f"MLIR text, mlir-torch or mlir-linalg; a checkpoint for other engines: {CHECKPOINT}; or an installed "
        "exporter: iree, a folder that IREE runs on the CPU, or model-explorer, a file with the graphs of all stages",
    )  # fmt: skip
    parser.add_argument("--output", "-o", metavar="PATH", required=True, help="the file or folder to write")
    parser.add_argument(
        "--stage", metavar="NAME", help="the stage to write as MLIR or with an exporter (default: the last, or all)"
    )
    parser.add_argument("--model", metavar="MODEL", help=f"for a checkpoint, the original model: {MODEL}")
    parser.add_argument(
        "--reader", choices=("any", "vllm", "transformers", NO_READER),
        help="for a checkpoint, the tool that will read it; layers that it cannot read are an error (default: any)",
    )  # fmt: skip


def _explain(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("scheme", metavar="SCHEME", nargs="?", help=SCHEME)
    which.add_argument("--pipeline", "-p", help=PIPELINE)
    parser.add_argument("--override", action="append", default=[], metavar="PATTERN=SCHEME", help=OVERRIDE)
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help=IGNORE)
    _json(parser)


def _opt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("graph", metavar="GRAPH", help="a .qir file, or - for standard input")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--pipeline", "-p", help='passes, such as "canonicalize; fp8-tile{x_format=#fp8_row}"')
    which.add_argument("--scheme", "-s", help="the pipeline of a scheme")
    parser.add_argument("--output", "-o", default="-", metavar="FILE", help="output file (default: standard output)")
    parser.add_argument(
        "--print-after", action="append", default=[], metavar="PASS", help='a pass, or "all": print the graph after it'
    )
    parser.add_argument("--dump", metavar="DIR", help="write the graph after each pass to numbered files")
    parser.add_argument("--time-passes", action="store_true", help="print the time of each pass to standard error")
    parser.add_argument(
        "--verify-each", action="store_true", help="also check whether passes report their changes correctly"
    )
    parser.add_argument("--explain", action="store_true", help="print to standard error why operations were skipped")
    parser.add_argument("--no-locations", action="store_true", help="omit locations from the text")


def _completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell to write the script for")


_ARGUMENTS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "compile": ("compile a model and save the result", _compile),
    "inspect": ("show what each pass did", _inspect),
    "report": ("show which layers were quantized, and why others were not", _report),
    "check": ("verify an artefact", _check),
    "bench": ("measure the latency of an artefact", _bench),
    "generate": ("generate text with a language model", _generate),
    "export": ("write an artefact as MLIR, an IREE folder, or a checkpoint", _export),
    "explain": ("describe what a scheme does, without a model", _explain),
    "passes": ("list the passes", _json),
    "schemes": ("list the schemes", _json),
    "opt": ("run passes over the text of a graph", _opt),
    "completion": ("print a shell completion script", _completion),
}
"""Command -> its help text, and the function that adds its arguments."""
