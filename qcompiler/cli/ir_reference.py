"""The reference of the graph IR, as Markdown, from the tables themselves: docs/ir-reference.md.

    $ python -m qcompiler.cli.ir_reference

Operations, element types, functions of bodies, the grammar and the verifier's rules each stand in one place in the
code; what is printed here is read from there, and a test holds the page to it.
"""

import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator

from qcompiler.dialects import body, core
from qcompiler.ir import DType, literals, op_table, parser, verifier
from qcompiler.ir.op_table import OpDef
from qcompiler.ir.sizes import FUNCTIONS
from qcompiler.numerics.dtypes import torch_dtype
from qcompiler.pass_manager import options as pass_options
from qcompiler.text import values
from qcompiler.text.reader import DEEPEST

HEAD = """\
# IR reference

Every operation, element type and rule of the graph IR, printed from the tables that the parser, the verifier and the
interpreter use: `python -m qcompiler.cli.ir_reference`. [The graph IR](graph-ir.md) is the introduction.
"""

DIALECTS = {
    "core": "What every graph is made of, and arithmetic on sizes outside of tensors.",
    "quant": "What passes yield: codes and scales are values, their format is an attribute.",
    "kernel": "What code generation consumes: as `quant`, with the order of the scales in memory settled.",
}
"""What a dialect is for, in the order of a pipeline; one that is not listed comes behind them."""

ATEN = """\
### aten, and any other namespace of torch

Operations of torch are not declared one by one. Every functional overload that torch knows is legal: `aten.add.Tensor`
is an overload by name, `aten.linear` the default one. Arguments and meaning are torch's own, and result types are what
capture recorded.
"""


def ir_reference() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_grammar(), *_types(), *_operations(), *_bodies(), *_rules()])


def _grammar() -> Iterator[str]:
    yield "## Grammar\n"
    grammars = [_indented(module.__doc__) for module in (parser, literals, values, pass_options)]
    yield f"```\n{''.join(grammars)}```\n"
    functions = ", ".join(f"`{name}`" for name in FUNCTIONS)
    yield "A scheme is spelled as a pass. In a graph, `//` begins a comment, so sizes there are divided by `floordiv`."
    yield f"Brackets nest {DEEPEST} deep. A size is a polynomial over symbols, numbers below 2^64, and functions"
    yield f"of sizes: {functions}.\n"


def _types() -> Iterator[str]:
    yield "## Element types\n"
    rows = ((f"`{dtype}`", f"`{torch_dtype(dtype)}`", str(dtype.bits)) for dtype in DType)
    yield _table(("element type", "in torch", "bits"), rows)


def _operations() -> Iterator[str]:
    yield "## Operations\n"
    declared = op_table.declared()
    known = {definition.name.partition(".")[0] for definition in declared}
    for dialect in [*DIALECTS, *sorted(known - DIALECTS.keys())]:
        yield f"### {dialect}\n"
        if dialect in DIALECTS:
            yield f"{DIALECTS[dialect]}\n"
        ours = [definition for definition in declared if definition.name.partition(".")[0] == dialect]
        yield from (part for definition in ours if not _is_arithmetic(definition) for part in _operation(definition))
        if dialect == "core":
            yield from _arithmetic(ours)
            yield ATEN


def _operation(definition: OpDef) -> Iterator[str]:
    yield f"#### {definition.name}\n"
    yield f"{definition.doc}\n"
    facts = []
    if definition.operands:
        facts.append(f"- Operands: {', '.join(map(_operand, definition.operands))}")
    if (types := _first_line(definition.types)) is not None:
        facts.append(f"- Types: {types}")
    if definition.meaning is not None and "._" not in _name(definition.meaning):
        facts.append(f"- Meaning: `{_name(definition.meaning)}`")
    if definition.role is not None:
        facts.append(f"- Role: {definition.role.name}")
    if definition.effects:
        facts.append(f"- Effects: {definition.effects.name}")
    if facts:
        yield "\n".join(facts) + "\n"
    rows = [(f"`{key}`", words, "") for key, (_, words) in definition.attributes.items()]
    rows += [(f"`{key}`", words, "may be left out") for key, (_, words) in definition.optional.items()]
    if rows:
        yield _table(("attribute", "is", ""), sorted(rows))


def _is_arithmetic(definition: OpDef) -> bool:
    return definition.name.removeprefix("core.") in core.SCALAR_FUNCTIONS


def _arithmetic(declared: Iterable[OpDef]) -> Iterator[str]:
    yield "#### Arithmetic on sizes\n"
    yield "Python's own functions on numbers outside of tensors; each takes what that function takes.\n"
    rows = ((f"`{d.name}`", f"`{_name(d.meaning)}`") for d in declared if _is_arithmetic(d) and d.meaning is not None)
    yield _table(("operation", "is"), rows)


def _bodies() -> Iterator[str]:
    yield "## Bodies\n"
    yield "The attribute `body` of `kernel.fused_quantize` and `kernel.fused_linear`:\n"
    _, example, explained, *_ = (body.__doc__ or "").split("\n\n")
    yield f"```\n{textwrap.dedent(example)}\n```\n\n{explained}\n"
    rows = (
        (f"`{name}`", str(function.arity), "the whole row" if function.across else "its own column")
        for name, function in sorted(body.FUNCTIONS.items())
    )
    yield _table(("function", "arguments", "a column of its result depends on"), rows)


def _rules() -> Iterator[str]:
    yield "## Rules\n"
    yield "`graph.verify()` holds a graph to these; each of its messages begins with the number of the rule.\n"
    yield _table(("rule", "says"), re.findall(r"^    (V\d+) +(.+)$", verifier.__doc__ or "", re.MULTILINE))


def _operand(name: str) -> str:
    if name == "*":
        return "any others"
    return f"`{name.removesuffix('?')}`" + (" (or None)" if name.endswith("?") else "")


def _name(function: object) -> str:
    module = getattr(function, "__module__", None) or ""
    return f"{module.removeprefix('_')}.{getattr(function, '__name__', function)}".removeprefix("builtins.")


def _first_line(function: object) -> str | None:
    text = inspect.getdoc(function) if function is not None else None
    if text is None:
        return None
    first = text.partition("\n")[0]
    return f"`{first.replace('`', '')}`" if first.startswith("(") else first


def _indented(docstring: str | None) -> str:
    """The block of a docstring that is indented."""
    rows = [row for row in (docstring or "").splitlines() if row.startswith("    ") or not row]
    return textwrap.dedent("\n".join(rows)).strip("\n") + "\n"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    print(ir_reference(), end="")
