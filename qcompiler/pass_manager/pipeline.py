"""Passes and pipelines: values that print, parse, and run.

    Pass.parse("fp8-tile{profile=deepgemm}")      str(pass) is its inverse
    Pipeline.parse("canonicalize; fp8-tile")      str(pipeline) is its inverse

A pass is known by its name as soon as its class is defined. Our own are found in the package `passes`, those of other
distributions through the entry point `qcompiler.passes`, whose name is the name of the pass; neither is imported before
a name asks for it.
"""

from abc import ABC
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from importlib import import_module
from inspect import get_annotations
from typing import Any, ClassVar, Self

from qcompiler.entry_points import load, offered, shown
from qcompiler.errors import PassError, did_you_mean
from qcompiler.ir import Graph, Missed, Rule, apply_rules
from qcompiler.pass_manager.options import (
    DASHED,
    WORD,
    OptionReader,
    converted,
    default_of,
    hint_of,
    print_option,
    wrong_value,
)
from qcompiler.text import Source

HOMES = ("passes",)
"""Packages that define passes when they are imported; only named here, since they stand on a higher floor."""

GROUP = "qcompiler.passes"


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


@dataclass(frozen=True)
class Pass(ABC):
    """One transformation of a graph: a frozen dataclass whose fields are its options.

    A subclass sets `name` and `effect`, says `before -> after` in its docstring, and gives `rules` or overrides `run`.
    Options are numbers, strings, dtypes and tuples of them, with type hints, to which their values are held.

    Attributes:
        name: The name in pipelines, with dashes.
        effect: What it may do to the numbers.
        budget: The largest relative error (norm of the difference over norm) that a lossy pass may add to an output;
            for one that reorders, what that may come to beyond its rounding, such as codes that it turns.
    """

    name: ClassVar[str]
    effect: ClassVar[Effect] = Effect.EXACT
    budget: ClassVar[float] = 0.0

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "name" not in cls.__dict__:
            return
        if not WORD.fullmatch(cls.name):
            need = "letters, digits and dashes, such as 'fp8-tile'"
            raise PassError(
                f"the name of pass class {cls.__qualname__} cannot be spelled", got=repr(cls.name), need=need
            )
        if cls.effect is Effect.LOSSY and not cls.budget > 0:
            need = "the largest relative error that it may add to an output, such as 0.1"
            raise PassError(f"pass '{cls.name}' is lossy, but has no budget", got=cls.budget, need=need)
        known = PASSES.get(cls.name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            need = f"a name that {known.__module__} has not taken"
            raise PassError("two passes have one name", got=f"{cls.name!r} in {cls.__module__}", need=need)
        PASSES[cls.name] = cls

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """A pass; PassError for a class that forgot its name or its decorator."""
        if not hasattr(cls, "name"):
            raise PassError(f"pass class {cls.__qualname__} has no name", fix='Give it one: name: ClassVar[str] = "…".')
        # Annotations last: from Python 3.14 on, reading them looks up names that only type checkers may know.
        if "__dataclass_fields__" not in cls.__dict__ and (options := _options(cls)):
            problem = f"pass class {cls.__qualname__} has options, but is no dataclass"
            raise PassError(problem, got=", ".join(options), fix="Put @dataclass(frozen=True) above it.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Holds the options to their type hints. Lists become tuples and integers floats where those are wanted."""
        for option in fields(self):
            value = getattr(self, option.name)
            try:
                object.__setattr__(self, option.name, converted(value, hint_of(type(self), option.name)))
            except ValueError:
                raise wrong_value(type(self), f"pass '{self.name}'", option, repr(value)) from None

    def rules(self) -> Sequence[Rule]:
        """The rewrites that make up this pass."""
        return ()

    def run(self, graph: Graph) -> bool:
        """Changes the graph; whether it did."""
        return apply_rules(graph, self.rules(), self.name)

    def explain(self, graph: Graph) -> dict[str, str]:
        """Why each candidate in `graph` is left alone, by the name of the candidate's first result.

        A candidate is an operation that some rule starts at; it is left alone when none of them matches.
        """
        reasons: dict[str, str] = {}
        rules = self.rules()
        for op in graph.ops():
            tried = [rule.match(op, graph) for rule in rules if rule.starts_at(op)]
            misses = [str(missed) for missed in tried if isinstance(missed, Missed)]
            if misses and len(misses) == len(tried) and op.results:
                reasons[op.results[0].name] = "; ".join(dict.fromkeys(misses))
        return reasons

    def __str__(self) -> str:
        values = [(option, getattr(self, option.name)) for option in fields(self)]
        shown = [f"{option.name}={print_option(value)}" for option, value in values if value != default_of(option)]
        return self.name + (f"{{{', '.join(shown)}}}" if shown else "")

    @classmethod
    def parse(cls, spec: str) -> "Pass":
        """The pass that `name{option=value, …}` spells; ParseError when malformed, PassError for what is unknown."""
        reader = OptionReader(Source(spec, "<pass>"))
        step = _read_pass(reader)
        reader.expect_end()
        return step


def _options(cls: type[Pass]) -> list[str]:
    """The options that a class declares itself."""
    return [key for key, hint in get_annotations(cls).items() if "ClassVar" not in str(hint)]


def pass_class(name: str) -> type[Pass]:
    """The class of the pass called `name`; PassError with did-you-mean when there is none."""
    for home in HOMES:
        import_module(home)
    if name not in PASSES and (entry := offered(GROUP).get(name)) is not None:
        load(entry)
        if name not in PASSES:
            raise PassError(
                "an entry point gives no pass of its name", got=shown(entry), need=f"a pass called {name!r}"
            )
    if name not in PASSES:
        raise PassError("no such pass", got=repr(name), fix=did_you_mean(name, {*PASSES, *offered(GROUP)}))
    return PASSES[name]


# Text -> passes


def _read_pass(reader: OptionReader) -> Pass:
    """The next pass: `name{option=value, …}`."""
    name = reader.word(DASHED, "the name of a pass")
    with reader.blaming(name):
        kind = pass_class(name.text)
    known = fields(kind)
    given = reader.options(kind, f"pass '{kind.name}'", [option.name for option in known])
    spec = reader.since(name)
    with reader.blaming(spec):
        missing = [o.name for o in known if o.name not in given and default_of(o) is MISSING]
        if missing:
            raise PassError(f"pass '{kind.name}' needs an option", got=repr(spec.text), need=f"{missing[0]}=…")
        return kind(**given)


def numbered(name: str, taken: Iterable[str]) -> str:
    """`name` for the first pass of that name in a pipeline, `name#2` for the second."""
    count = 1 + sum(other.partition("#")[0] == name for other in taken)
    return name if count == 1 else f"{name}#{count}"


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. A value: editing gives a new one; where a pass is wanted, its text will do.

        Pipeline.parse("canonicalize; fp8-tile; dead-code").insert_after("fp8-tile", MyPass()).without("dead-code")

    The second pass of a name is called `name#2`, as in the stages of a run.
    """

    passes: tuple[Pass, ...] = ()

    def __post_init__(self) -> None:
        """Takes a list for a tuple; PassError for what is no pass."""
        object.__setattr__(self, "passes", tuple(self.passes))
        for step in self.passes:
            if not isinstance(step, Pass):
                fix = f"Write {step.__name__}()." if isinstance(step, type) else None
                raise PassError("a pipeline holds passes only", got=repr(step), need="an instance of a pass", fix=fix)

    @classmethod
    def parse(cls, text: str) -> "Pipeline":
        """The pipeline that `pass; pass{option=value}; …` spells; ParseError when malformed, PassError when unknown."""
        reader = OptionReader(Source(text, "<pipeline>"))
        return cls(tuple(reader.separated(lambda: _read_pass(reader), ";")))

    def __str__(self) -> str:
        return "; ".join(map(str, self.passes))

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the passes, each once: the second of a name is called `name#2`."""
        names: list[str] = []
        for step in self.passes:
            names.append(numbered(step.name, names))
        return tuple(names)

    def __contains__(self, name: object) -> bool:
        return name in self.names or name in self.passes

    def __getitem__(self, name: str) -> Pass:
        """The pass called `name`."""
        return self.passes[self._find(name)]

    def insert_before(self, name: str, *passes: Pass | str) -> "Pipeline":
        """With `passes` in front of the pass called `name`."""
        return self._splice(self._find(name), 0, passes)

    def insert_after(self, name: str, *passes: Pass | str) -> "Pipeline":
        """With `passes` behind the pass called `name`."""
        return self._splice(self._find(name) + 1, 0, passes)

    def replace(self, name: str, *passes: Pass | str) -> "Pipeline":
        """With `passes` in the place of the pass called `name`."""
        return self._splice(self._find(name), 1, passes)

    def without(self, name: str) -> "Pipeline":
        """Without any pass called `name`; `name#2` means the second one alone."""
        at = self._find(name)
        return Pipeline(tuple(p for i, p in enumerate(self.passes) if i != at and p.name != name))

    def append(self, *passes: Pass | str) -> "Pipeline":
        """With `passes` at the end."""
        return self._splice(len(self.passes), 0, passes)

    def _splice(self, at: int, remove: int, passes: Iterable[Pass | str]) -> "Pipeline":
        added = [step for given in passes for step in (Pipeline.parse(given) if isinstance(given, str) else (given,))]
        return Pipeline((*self.passes[:at], *added, *self.passes[at + remove :]))

    def _find(self, name: str) -> int:
        if name not in self.names:
            raise PassError("the pipeline has no such pass", got=repr(name), fix=did_you_mean(name, self.names))
        return self.names.index(name)
