"""Runs the ranks of a sharded graph, and random graphs of blocks that can be sharded."""

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor

from qcompiler.distributed.communicator import Communicator
from qcompiler.distributed.simulation import Simulation
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph, Mesh, Op
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline


def rank_graphs(
    graph: Graph, mesh: str, then: str = "", unit: str = "[1, 1]", more: str = "", rewrite: str = ""
) -> list[Graph]:
    """The programs of all ranks, after further passes; `rewrite` runs before the graph is that of one rank."""
    found = []
    for rank in range(Mesh.parse(mesh).size):
        own = graph.clone()
        options = f'{{mesh="{mesh}", unit={unit}{more}}}'
        place = f"split-linears{options}; split-norms{options}; shard{options}; collectives; {rewrite}"
        steps = f'{place}partition{{mesh="{mesh}", rank={rank}}}; {then}'
        run_pipeline(Pipeline.parse(steps), own)
        found.append(own)
    assert len({str(each) for each in found}) == 1
    return found


def run_ranks(graphs: list[Graph], mesh: str, inputs: Any) -> tuple[list[Any], list[dict[str, Tensor]]]:
    """The outputs of each rank, and all of its values by name."""
    values: list[dict[str, Tensor]] = [{} for _ in graphs]

    def keep(rank: int, op: Op, results: tuple[Any, ...]) -> None:
        values[rank].update((value.name, out) for value, out in zip(op.results, results, strict=True))

    runs = [partial(interpret, graph, inputs, observe=partial(keep, rank)) for rank, graph in enumerate(graphs)]
    return Simulation(Mesh.parse(mesh)).run(runs), values


def run_whole_and_ranks(
    graph: Graph, mesh: str, passes: str, inputs: Any
) -> tuple[dict[str, Tensor], list[Graph], list[Any], list[dict[str, Tensor]]]:
    """Runs passes on a graph, in blocks of 128, and then the graph on one process and on ranks.

    Returns:
        The values of one process by name; then the program of each rank, its outputs, and its values by name.
    """
    ranks = rank_graphs(graph, mesh, passes, "[128, 128]")
    run_pipeline(Pipeline.parse(passes), graph)
    whole: dict[str, Tensor] = {}

    def keep(op: Op, results: tuple[Any, ...]) -> None:
        whole.update((value.name, out) for value, out in zip(op.results, results, strict=True))

    interpret(graph, inputs, observe=keep)
    return whole, ranks, *run_ranks(ranks, mesh, inputs)


MLP = """func @m(%x: f32[s0, 64]) -> (f32[s0, 64]) where s0 in 1..64 {
  %w1 = core.param() {name = "w1"} : f32[256, 64]
  %w2 = core.param() {name = "w2"} : f32[64, 256]
  %g = aten.linear(%x, %w1) : f32[s0, 256]
  %h = aten.relu(%g) : f32[s0, 256]
  %y = aten.linear(%h, %w2) : f32[s0, 64]
  return %y
}"""


def mlp() -> Graph:
    """Two linears with weights, whose region has 256 columns."""
    graph = Graph.parse(MLP)
    generator = torch.Generator().manual_seed(0)
    for name, shape in (("w1", (256, 64)), ("w2", (64, 256))):
        graph.weights[name] = torch.randn(shape, generator=generator)
    return graph


MLP_INPUT = torch.linspace(-1, 1, 5 * 64).reshape(5, 64)


MOVES: list[Callable[[Communicator, Tensor], Tensor]] = [
    lambda rank, x: rank.all_reduce(x, "tp"),
    lambda rank, x: rank.all_gather(x, "tp", 0),
    lambda rank, x: rank.all_gather(x, "tp", 1),
    lambda rank, x: rank.reduce_scatter(x[:4], "tp", 0),
    lambda rank, x: rank.reduce_scatter(x, "tp", 1),
    lambda rank, x: rank.all_to_all(x[:4], "tp"),
]
"""Collectives of one rank."""


class RandomBlocks:
    """Text of a graph over `%x: f32[s0, s1, width]`: MLPs and attention with residuals, in random forms."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.lines: list[str] = []
        self.parts = self.rng.choice((2, 3, 4))
        self.width = self.rng.choice((8, 12, 16))
        self.count = 0

    def text(self) -> str:
        """The graph."""
        x = "%x"
        for _ in range(self.rng.randint(1, 3)):
            y = self.rng.choice((self.mlp, self.attention))(self.norm(x) if self.rng.random() < 0.5 else x)
            x = self.add("aten.add.Tensor", f"{x}, {y}", f"s0, s1, {self.width}")
        kind = f"f32[s0, s1, {self.width}]"
        head = f"func @m(%x: {kind}) -> ({kind}) where s0 in 1..3, s1 in 1..7 {{"
        sizes = ["%b = aten.sym_size.int(%x, 0) : int(s0)", "%s = aten.sym_size.int(%x, 1) : int(s1)"]
        return "\n  ".join([head, *sizes, *self.lines, f"return {x}"]) + "\n}"

    def add(self, op: str, args: str, shape: str, attrs: str = "") -> str:
        self.count += 1
        self.lines.append(f"%v{self.count} = {op}({args}){attrs} : f32[{shape}]")
        return f"%v{self.count}"

    def weight(self, *shape: int) -> str:
        name = f"w{self.count + 1}"
        return self.add("core.param", "", ", ".join(map(str, shape)), f' {{name = "{name}"}}')

    def linear(self, x: str, rows: int, columns: int) -> str:
        weights = [self.weight(rows, columns), *([self.weight(rows)] * (self.rng.random() < 0.5))]
        return self.add("aten.linear", ", ".join([x, *weights]), f"s0, s1, {rows}")

    def norm(self, x: str) -> str:
        flat, whole = f"s0*s1, {self.width}", f"s0, s1, {self.width}"
        if self.rng.random() < 0.7:
            return self.add("aten.rms_norm", f"{x}, [{self.width}], {self.weight(self.width)}", whole)
        x = self.add("aten.view", f"{x}, [-1, {self.width}]", flat)
        y = self.add("aten.rms_norm", f"{x}, [{self.width}], {self.weight(self.width)}", flat)
        return self.add("aten.view", f"{y}, [%b, %s, {self.width}]", whole)

    def mlp(self, x: str) -> str:
        inner = self.parts * self.rng.choice((2, 5))
        shape = f"s0, s1, {inner}"
        y = self.add(self.rng.choice(("aten.silu", "aten.relu", "aten.gelu")), self.linear(x, inner, self.width), shape)
        if self.rng.random() < 0.5:
            y = self.add("aten.mul.Tensor", f"{y}, {self.linear(x, inner, self.width)}", shape)
        if self.rng.random() < 0.3:
            y = self.add("aten.mul.Tensor", f"{self.weight(inner)}, {y}", shape)
        return self.linear(y, self.width, inner)

    def heads(self, x: str, count: int, size: int, norm: bool = True) -> str:
        y, literal = self.linear(x, count * size, self.width), self.rng.choice((str(count), "-1"))
        if norm and self.rng.random() < 0.3:  # over all heads
            weight, shape = self.weight(count * size), f"s0, s1, {count * size}"
            y = self.add("aten.rms_norm", f"{y}, [{count * size}], {weight}", shape)
        y = self.add("aten.view", f"{y}, [%b, %s, {literal}, {size}]", f"s0, s1, {count}, {size}")
        if self.rng.random() < 0.3:
            y = self.add("aten.rms_norm", f"{y}, [{size}], {self.weight(size)}", f"s0, s1, {count}, {size}")
        return self.add("aten.transpose.int", f"{y}, 1, 2", f"s0, {count}, s1, {size}")

    def attention(self, x: str) -> str:
        shared = self.rng.choice([n for n in range(1, self.parts + 1) if self.parts % n == 0])  # ranks for a KV head
        groups = self.parts // shared * (self.rng.choice((1, 2)) if shared == 1 else 1)
        heads, size = groups * shared * self.rng.choice((1, 2, 3)), 4
        wide = heads * size >= self.width  # else a norm over all heads stays whole, as the one of a latent
        q = self.heads(x, heads, size, norm=wide)
        k, v = (self.heads(x, groups, size, norm=wide and shared in (1, self.parts)) for _ in "kv")
        y = self.add("attention.causal", f"{q}, {k}, {v}", f"s0, {heads}, s1, {size}", " {scale = 0.5}")
        y = self.add("aten.transpose.int", f"{y}, 1, 2", f"s0, s1, {heads}, {size}")
        y = self.add("aten.reshape", f"{y}, [%b, %s, {heads * size}]", f"s0, s1, {heads * size}")
        return self.linear(y, self.width, heads * size)


def residual_mlps(width: int, first: int, second: int) -> str:
    """Text of two MLPs with residual sums and a norm in between, on f32[s0, s1, width]; `first` and `second` inside."""
    return f"""func @m(%x: f32[s0, s1, {width}]) -> (f32[s0, s1, {width}]) where s0 in 1..4, s1 in 1..16 {{
  %n = core.param() {{name = "n"}} : f32[{width}]
  %w1 = core.param() {{name = "w1"}} : f32[{first}, {width}]
  %w2 = core.param() {{name = "w2"}} : f32[{width}, {first}]
  %w3 = core.param() {{name = "w3"}} : f32[{second}, {width}]
  %w4 = core.param() {{name = "w4"}} : f32[{width}, {second}]
  %g1 = aten.linear(%x, %w1) : f32[s0, s1, {first}]
  %h1 = aten.silu(%g1) : f32[s0, s1, {first}]
  %y1 = aten.linear(%h1, %w2) : f32[s0, s1, {width}]
  %r1 = aten.add.Tensor(%x, %y1) : f32[s0, s1, {width}]
  %m1 = aten.rms_norm(%r1, [{width}], %n) : f32[s0, s1, {width}]
  %g2 = aten.linear(%m1, %w3) : f32[s0, s1, {second}]
  %h2 = aten.silu(%g2) : f32[s0, s1, {second}]
  %y2 = aten.linear(%h2, %w4) : f32[s0, s1, {width}]
  %r2 = aten.add.Tensor(%r1, %y2) : f32[s0, s1, {width}]
  return %r2
}}"""
