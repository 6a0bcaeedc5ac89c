"""Passes and pipelines: they print, parse, and run.

    Pass.parse("fp8-tile{profile=deepgemm}")      str(pass) is its inverse
    Pipeline.parse("canonicalize; fp8-tile")      str(pipeline) is its inverse

Defining a pass class registers it by name. Built-in passes are in the package `passes`; other distributions add passes
through the entry point group `qcompiler.passes`, with the pass name as the entry point name. Both are imported on first
lookup.
"""

from abc import ABC
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    convert_options,
    default_of,
    print_option,
)
from qcompiler.text import Source

HOMES = ("passes",)
"""Packages that define passes on import; given by name because they are on a higher floor."""

GROUP = "qcompiler.passes"


class Effect(Enum):
    """How a pass may change numerical results; checked by the `Validate` instrument."""

    EXACT = "exact"
    """Equal bits."""
    REORDERS = "reorders"
    """Equal except for the order of floating-point operations."""
    LOSSY = "lossy"
    """Quantizes, within an error budget."""


PASSES: dict[str, type["Pass"]] = {}
"""All defined pass classes, by name."""


@dataclass(frozen=True)
class Pass(ABC):
    """A graph transformation: a frozen dataclass whose fields are its options.

    A subclass sets `name` and `effect`, shows `before -> after` in its docstring, and overrides `rules` or `run`.
    Options are numbers, strings, dtypes, and tuples of them; values are checked against the type hints.

    Attributes:
        name: The name in pipelines, with dashes.
        effect: How the pass may change numerical results.
        budget: The largest relative error (norm of the difference over norm) that a lossy pass may add to an output;
            for a reordering pass, the error allowed beyond rounding, for example from codes that change.
        unrelated: Reasons that `explain` omits: such candidates have nothing to do with the pass.
    """

    name: ClassVar[str]
    effect: ClassVar[Effect] = Effect.EXACT
    budget: ClassVar[float] = 0.0
    unrelated: ClassVar[tuple[Missed, ...]] = ()

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "name" not in cls.__dict__:
            return
        if not WORD.fullmatch(cls.name):
            need = "letters, digits and dashes, such as 'fp8-tile'"
            raise PassError(f"the name of pass class {cls.__qualname__} is not valid", got=repr(cls.name), need=need)
        if cls.effect is Effect.LOSSY and not cls.budget > 0:
            need = "the largest relative error that it may add to an output, such as 0.1"
            raise PassError(f"pass '{cls.name}' is lossy but has no budget", got=cls.budget, need=need)
        known = PASSES.get(cls.name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            need = f"a name that {known.__module__} has not taken"
            raise PassError("two passes have one name", got=f"{cls.name!r} in {cls.__module__}", need=need)
        PASSES[cls.name] = cls

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Creates a pass; raises PassError if the class lacks a name or the dataclass decorator."""
        if not hasattr(cls, "name"):
            raise PassError(f"pass class {cls.__qualname__} has no name", fix='Add name: ClassVar[str] = "…".')
        # Annotations last: from Python 3.14, reading them evaluates names that may exist only for type checkers.
        if "__dataclass_fields__" not in cls.__dict__ and (options := _options(cls)):
            problem = f"pass class {cls.__qualname__} has options but is not a dataclass"
            raise PassError(problem, got=", ".join(options), fix="Put @dataclass(frozen=True) above it.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Checks the options against their type hints; converts lists to tuples and integers to floats as needed."""
        convert_options(self, f"pass '{self.name}'")

    def rules(self) -> Sequence[Rule]:
        """The rewrite rules of this pass."""
        return ()

    def run(self, graph: Graph) -> bool:
        """Runs the pass on the graph, in place; returns whether the graph changed."""
        return apply_rules(graph, self.rules(), self.name)

    def translated(
        self, before: Graph, inputs: Sequence[Any], outputs: Mapping[str, Any]
    ) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """A call after this pass: its inputs, and the outputs that it must give; only an interface pass changes them.

        Args:
            before: The graph before the pass.
            inputs: The inputs of a call of that graph.
            outputs: Its outputs and updates, by name.
        """
        return inputs, outputs

    def explain(self, graph: Graph) -> dict[str, str]:
        """Why each candidate in `graph` is skipped, by the name of the candidate's first result.

        A candidate is an operation that some rule starts at; it is skipped if no rule matches.
        """
        reasons: dict[str, str] = {}
        rules, unrelated = self.rules(), {*map(str, self.unrelated)}
        for op in graph.ops():
            tried = [rule.match(op, graph) for rule in rules if rule.starts_at(op)]
            misses = [str(missed) for missed in tried if isinstance(missed, Missed)]
            if misses and len(misses) == len(tried) and op.results:
                reasons[op.results[0].name] = "; ".join(dict.fromkeys(misses))
        return {name: why for name, why in reasons.items() if why not in unrelated}

    def __str__(self) -> str:
        values = [(option, getattr(self, option.name)) for option in fields(self)]
        shown = [f"{option.name}={print_option(value)}" for option, value in values if value != default_of(option)]
        return self.name + (f"{{{', '.join(shown)}}}" if shown else "")

    @classmethod
    def parse(cls, spec: str) -> "Pass":
        """Parses `name{option=value, …}`; raises ParseError if malformed, PassError for unknown names."""
        reader = OptionReader(Source(spec, "<pass>"))
        step = _read_pass(reader)
        reader.expect_end()
        return step


def _options(cls: type[Pass]) -> list[str]:
    """The options that a class itself declares."""
    return [key for key, hint in get_annotations(cls).items() if "ClassVar" not in str(hint)]


def pass_class(name: str) -> type[Pass]:
    """The class of the pass called `name`; raises PassError with a did-you-mean hint if there is none."""
    for home in HOMES:
        import_module(home)
    if name not in PASSES and (entry := offered(GROUP).get(name)) is not None:
        load(entry)
        if name not in PASSES:
            raise PassError(
                "an entry point does not define a pass of its name", got=shown(entry), need=f"a pass called {name!r}"
            )
    if name not in PASSES:
        raise PassError("no such pass", got=repr(name), fix=did_you_mean(name, {*PASSES, *offered(GROUP)}))
    return PASSES[name]


# Text -> passes


def _read_pass(reader: OptionReader) -> Pass:
    """Reads a pass: `name{option=value, …}`."""
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
    """`name` for the first pass of this name in a pipeline, `name#2` for the second."""
    count = 1 + sum(other.partition("#")[0] == name for other in taken)
    return name if count == 1 else f"{name}#{count}"


@dataclass(frozen=True)
class Pipeline:
    """An immutable sequence of passes; edits return a new pipeline, and accept passes as objects or text.

        Pipeline.parse("canonicalize; fp8-tile; dead-code").insert_after("fp8-tile", MyPass()).without("dead-code")

    The second pass of a name is called `name#2`, as in the stages of a run.
    """

    passes: tuple[Pass, ...] = ()

    def __post_init__(self) -> None:
        """Converts a list to a tuple; raises PassError for an item that is not a pass."""
        object.__setattr__(self, "passes", tuple(self.passes))
        for step in self.passes:
            if not isinstance(step, Pass):
                fix = f"Write {step.__name__}()." if isinstance(step, type) else None
                raise PassError(
                    "an item of a pipeline is not a pass", got=repr(step), need="an instance of a pass", fix=fix
                )

    @classmethod
    def parse(cls, text: str) -> "Pipeline":
        """Parses `pass; pass{option=value}; …`; raises ParseError if malformed, PassError for unknown names."""
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
        """Unique names of the passes: the second pass of a name is called `name#2`."""
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
        """A pipeline with `passes` inserted before the pass called `name`."""
        return self._splice(self._find(name), 0, passes)

    def insert_after(self, name: str, *passes: Pass | str) -> "Pipeline":
        """A pipeline with `passes` inserted after the pass called `name`."""
        return self._splice(self._find(name) + 1, 0, passes)

    def replace(self, name: str, *passes: Pass | str) -> "Pipeline":
        """A pipeline with the pass called `name` replaced by `passes`."""
        return self._splice(self._find(name), 1, passes)

    def without(self, name: str) -> "Pipeline":
        """A pipeline without all passes called `name`; `name#2` removes only the second one."""
        at = self._find(name)
        return Pipeline(tuple(p for i, p in enumerate(self.passes) if i != at and p.name != name))

    def append(self, *passes: Pass | str) -> "Pipeline":
        """A pipeline with `passes` added at the end."""
        return self._splice(len(self.passes), 0, passes)

    def _splice(self, at: int, remove: int, passes: Iterable[Pass | str]) -> "Pipeline":
        added = [step for given in passes for step in (Pipeline.parse(given) if isinstance(given, str) else (given,))]
        return Pipeline((*self.passes[:at], *added, *self.passes[at + remove :]))

    def _find(self, name: str) -> int:
        if name not in self.names:
            raise PassError("the pipeline has no such pass", got=repr(name), fix=did_you_mean(name, self.names))
        return self.names.index(name)
