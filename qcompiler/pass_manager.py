"""Passes and pipelines: values that print, parse, and run.

    Pass.parse("fp8-tile{profile=deepgemm}")      str(pass) is its inverse
    Pipeline.parse("canonicalize; fp8-tile")      str(pipeline) is its inverse
"""

import re
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, ClassVar

from qcompiler.errors import ParseError, PassError, did_you_mean
from qcompiler.ir import DType, Graph, Rule, apply_rules, explain, parse_literal, print_argument


class Effect(Enum):
    """What a pass may do to the numbers; the `Validate` instrument holds it to that."""

    EXACT = "exact"
    """Equal bits."""
    REORDERS = "reorders"
    """Equal but for the order of floating-point operations."""
    LOSSY = "lossy"
    """Quantizes, within an error budget."""


PASSES: dict[str, type["Pass"]] = {}
"""Every pass class that has been defined, by name."""

finders: list[Callable[[], None]] = []
"""Called, once each, when a name is unknown: they import what may define it (installed third-party packages)."""


@dataclass(frozen=True)
class Pass(ABC):
    """One transformation of a graph: a frozen dataclass whose fields are its options.

    A subclass sets `name` and `effect`, says `before -> after` in its docstring, and gives `rules` (or overrides `run`).
    Defining it makes it known by its name, for pipelines in text and on the command line.

    Attributes:
        name: The name in pipelines, with dashes.
        effect: What it may do to the numbers.
        budget: For a lossy pass, the largest relative error (norm of the difference over norm) it may add to an output.
    """

    name: ClassVar[str]
    effect: ClassVar[Effect] = Effect.EXACT
    budget: ClassVar[float] = 0.0

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "name" in cls.__dict__:
            known = PASSES.get(cls.name)
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise PassError("two passes have one name", got=f"{cls.name!r} in {cls.__module__}", need=f"a name that {known.__module__} has not taken")
            PASSES[cls.name] = cls

    def rules(self) -> Sequence[Rule]:
        """The rewrites that make up this pass."""
        return ()

    def run(self, graph: Graph) -> bool:
        """Changes the graph; whether it did."""
        return apply_rules(graph, self.rules(), self.name)

    def explain(self, graph: Graph) -> dict[str, str]:
        """Why each candidate in `graph` is left alone, by the name of the candidate's first result."""
        return {op.results[0].name: str(missed) for op, _, missed in explain(graph, self.rules()) if op.results}

    def __str__(self) -> str:
        options = [
            f"{field.name}={_print_option(getattr(self, field.name))}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return self.name + (f"{{{', '.join(options)}}}" if options else "")

    @classmethod
    def parse(cls, spec: str) -> "Pass":
        """The pass that `name{option=value, …}` spells; PassError for an unknown name or option."""
        match = re.fullmatch(r"\s*([\w-]+)\s*(?:\{(.*)\})?\s*", spec, re.DOTALL)
        if match is None:
            raise PassError("a pass is malformed", got=repr(spec), need="name{option=value, option=value}")
        kind = pass_class(match[1])
        return kind(**dict(_parse_option(kind, option) for option in _split(match[2] or "", ",")))


def pass_class(name: str) -> type[Pass]:
    """The class of the pass called `name`; PassError with did-you-mean when there is none."""
    if name not in PASSES:
        while finders:
            finders.pop()()
    if name not in PASSES:
        raise PassError("no such pass", got=repr(name), fix=did_you_mean(name, PASSES))
    return PASSES[name]


def _print_option(value: Any) -> str:
    return value if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w-]*", value) else print_argument(value)


def _parse_option(kind: type[Pass], text: str) -> tuple[str, Any]:
    key, equals, value = (part.strip() for part in text.partition("="))
    known = {field.name: field for field in fields(kind)}
    key = key.replace("-", "_")
    if key not in known or not equals:
        raise PassError(f"pass '{kind.name}' has no such option", got=repr(text.strip()), fix=did_you_mean(key, known))
    default = known[key].default
    if isinstance(default, str) and re.fullmatch(r"[A-Za-z_][\w-]*", value):
        return key, value
    try:
        literal = parse_literal(value)
    except ParseError:
        literal = None
    if isinstance(default, float) and isinstance(literal, int) and not isinstance(literal, bool):
        literal = float(literal)
    if type(literal) is not type(default) and not (default is None and literal is not None):
        shown = "a dtype" if isinstance(default, DType) else f"a {type(default).__name__} like {print_argument(default)}"
        raise PassError(f"option '{key}' of pass '{kind.name}' has a wrong value", got=value, need=shown)
    return key, literal


def _split(text: str, mark: str) -> list[str]:
    """The parts of `text` between marks that stand outside of brackets and quotes."""
    parts, depth, quoted = [""], 0, False
    for character in text:
        quoted ^= character == '"'
        depth += (character in "{[(") - (character in ")]}") if not quoted else 0
        if character == mark and not depth and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. A value: editing gives a new one.

        Pipeline.parse("canonicalize; fp8-tile; dead-code").insert_after("fp8-tile", MyPass()).without("dead-code")
    """

    passes: tuple[Pass, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Pipeline":
        """The pipeline that `pass; pass{option=value}; …` spells; PassError when it is malformed."""
        if text.count("{") != text.count("}") or text.count("[") != text.count("]"):
            raise PassError("a pipeline is malformed: its brackets do not match", got=repr(text), need="pass; pass{option=value}; …")
        return cls(tuple(Pass.parse(spec) for spec in _split(text, ";")))

    def __str__(self) -> str:
        return "; ".join(map(str, self.passes))

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def __getitem__(self, name: str) -> Pass:
        """The first pass called `name`."""
        return self.passes[self._find(name)]

    def insert_before(self, name: str, *passes: Pass) -> "Pipeline":
        """With `passes` in front of the first pass called `name`."""
        return self._splice(self._find(name), 0, passes)

    def insert_after(self, name: str, *passes: Pass) -> "Pipeline":
        """With `passes` behind the first pass called `name`."""
        return self._splice(self._find(name) + 1, 0, passes)

    def replace(self, name: str, *passes: Pass) -> "Pipeline":
        """With `passes` in the place of the first pass called `name`."""
        return self._splice(self._find(name), 1, passes)

    def without(self, name: str) -> "Pipeline":
        """Without any pass called `name`."""
        self._find(name)
        return Pipeline(tuple(p for p in self.passes if p.name != name))

    def append(self, *passes: Pass) -> "Pipeline":
        """With `passes` at the end."""
        return self._splice(len(self.passes), 0, passes)

    def _splice(self, at: int, remove: int, passes: Iterable[Pass]) -> "Pipeline":
        return Pipeline((*self.passes[:at], *passes, *self.passes[at + remove :]))

    def _find(self, name: str) -> int:
        names = [p.name for p in self.passes]
        if name not in names:
            raise PassError("the pipeline has no such pass", got=repr(name), fix=did_you_mean(name, names))
        return names.index(name)
