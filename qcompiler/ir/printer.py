"""Graph -> text.

    func @mlp(%x: bf16[s0, 256]) -> (bf16[s0, 512]) where s0 in 1..4096 {
      %fc1.weight = core.param() {name = "fc1.weight"} : bf16[512, 256]
      %linear = aten.linear(%x, %fc1.weight) : bf16[s0, 512] loc("mlp.py":9 in "fc1")
      return %linear
    }

All operations share one grammar, types appear only where a value is defined, and the text round-trips.
"""

from qcompiler.ir.op import Argument, Op, Value, print_argument, print_op
from qcompiler.ir.structure import Structure


def print_graph(graph: Structure, *, locations: bool = True) -> str:
    """The text of a graph, ending without a newline."""
    ops = list(graph)
    inputs = ", ".join(print_binding(op.result, op if locations else None) for op in ops if op.name == "core.input")
    results = ", ".join(map(print_claim, graph.outputs))
    where = ", ".join(f"{name} in {graph.symbols[name]}" for name in sorted(graph.symbols))
    head = f"func @{graph.name}({inputs}) -> ({results}){f' where {where}' if where else ''} {{"
    body = [f"  {print_op(op, locations=locations)}" for op in ops if op.name != "core.input"]
    return "\n".join([head, *body, "}"])


def print_claim(output: Argument) -> str:
    """An output in the function header: the type instead of the value."""
    if isinstance(output, tuple):
        return f"[{', '.join(map(print_claim, output))}]"
    return str(output.type) if isinstance(output, Value) else print_argument(output)


def print_binding(value: Value, op: Op | None = None) -> str:
    """`%x: bf16[s0, 256]`, with the location of `op` if `op` is given and has one."""
    return " ".join(filter(None, [f"{value}: {value.type}", str(op.loc) if op else ""]))
