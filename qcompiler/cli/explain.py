"""`qcompiler explain`: describes a pipeline from the docstrings of its passes and options."""

import argparse
import textwrap
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from typing import Any

from qcompiler.cli.docstrings import attributes, first_line, sentence
from qcompiler.cli.output import print_json
from qcompiler.cli.requests import needs_data, overrides_of, pipeline_of
from qcompiler.pass_manager.options import default_of, print_option
from qcompiler.pass_manager.pipeline import Effect, Pass
from qcompiler.schemes.named import Options, Scheme, read_scheme, values_of
from qcompiler.schemes.pipelines import QuantizationSpec

WIDTH = 100


def run(options: argparse.Namespace) -> int:
    """Explains a scheme or a pipeline."""
    overrides = overrides_of(options.override, options.ignore)
    pipeline = pipeline_of(options.scheme, options.pipeline, overrides)
    scheme, spec = read_scheme(options.scheme) if options.scheme is not None else (None, None)
    document = {
        "scheme": options.scheme,
        "doc": scheme.doc if scheme is not None else "",
        "needs_calibration": needs_data(pipeline),
        "options": _scheme_options(scheme, spec),
        "overrides": dict(overrides or {}),
        "pipeline": str(pipeline),
        "passes": [_explained(name, step) for name, step in zip(pipeline.names, pipeline, strict=True)],
    }
    if options.json:
        print_json(document)
    else:
        print("\n".join(_in_words(document)))
    return 0


def _scheme_options(scheme: Scheme | None, spec: QuantizationSpec | None) -> list[dict[str, Any]]:
    if scheme is None or spec is None:
        return []
    says, values = attributes(Options), values_of(spec)
    return [
        {"name": name, "value": print_option(getattr(values, name)), "doc": says.get(name, "")}
        for name in scheme.options
    ]


def _explained(stage: str, step: Pass) -> dict[str, Any]:
    says = attributes(type(step))
    changed = [
        {"name": option.name, "value": print_option(value), "doc": says.get(option.name, "")}
        for option in fields(step)
        if (value := getattr(step, option.name)) != default_of(option) or _is_own(step, option)
    ]
    return {
        "stage": stage, "spec": str(step), "effect": step.effect.value, "budget": step.budget,
        "does": sentence(type(step)), "doc": first_line(type(step)), "options": changed,
    }  # fmt: skip


def _is_own(step: Pass, option: "Field[Any]") -> bool:
    """Whether the pass itself declares an option; an inherited option is the base class's field object."""
    bases = (base for base in type(step).__mro__[1:] if is_dataclass(base))
    return not any(option is inherited for base in bases for inherited in fields(base))


# As text


def _in_words(document: dict[str, Any]) -> Iterator[str]:
    if document["scheme"]:
        yield from _wrapped(f"{document['scheme']}: {document['doc']}")
    data = "needs calibration: give real inputs." if document["needs_calibration"] else "needs no calibration data."
    yield f"It {data}"
    for pattern, scheme in document["overrides"].items():
        what = "skipped" if scheme is None else f"quantized by {scheme}"
        yield f"Layers whose weights match {pattern} are {what}."
    if document["options"]:
        yield "\nScheme options and their values:"
        yield from _options(document["options"], "  ")
    count = len(document["passes"])
    yield f"\n{count} passes run, in this order:" if count != 1 else "\nOne pass runs:"
    for number, step in enumerate(document["passes"], 1):
        yield ""
        yield from _wrapped(f"{number:2}. {step['stage']}: {step['does'] or step['doc']}", "    ")
        if step["does"] and step["doc"]:
            yield from _wrapped(f"    {step['doc']}", "    ")
        yield from _wrapped(f"    {_promise(step['effect'], step['budget'])}", "    ")
        yield from _options(step["options"], "      ")


def _promise(effect: str, budget: float) -> str:
    """The numerical effect that a pass declares."""
    more = f", and up to {budget:.3g} of relative error beyond rounding" if budget else ""
    return {
        Effect.EXACT: "Results are bit-identical.",
        Effect.REORDERS: f"Floating-point operations may be reordered{more}.",
        Effect.LOSSY: f"Adds a relative error of up to {budget:.3g}.",
    }[Effect(effect)]


def _options(options: list[dict[str, Any]], indent: str) -> Iterator[str]:
    for option in options:
        says = f": {option['doc']}" if option["doc"] else ""
        yield from _wrapped(f"{indent}{option['name']} = {option['value']}{says}", f"{indent}  ")


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
