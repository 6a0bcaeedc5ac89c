"""merge-linears: which linears with the same input are merged, why others are not, and equal codes and scales."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.fusing.merge_linears import MergeLinears
from passes.quantizing.fp8_tile import Fp8Tile
from passes.quantizing.quantize import Quantize
from qcompiler import numerics
from qcompiler.errors import PassError
from qcompiler.interpreter import interpret
from qcompiler.ir import DType, Format, Graph
from qcompiler.ir.formats import FP8_BLOCK, FP8_ROW, FP8_TENSOR, FP8_TILE, INT8_ROW
from qcompiler.numerics import ALL
from qcompiler.pass_manager.instruments import CheckChanged, Validate
from qcompiler.pass_manager.pipeline import Pass, Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.testing import difference, random_inputs


def siblings(*columns: int, dtype: str = "f32", bias: bool = True, k: int = 160) -> Graph:
    """Linears with the same input, each used by a sum."""
    lines = []
    for index, n in enumerate(columns):
        lines += [f'%w{index} = core.param() {{name = "l{index}.weight"}} : {dtype}[{n}, {k}]']
        lines += [f'%b{index} = core.param() {{name = "l{index}.bias"}} : {dtype}[{n}]'] * bias
        lines += [f"%y{index} = aten.linear(%x, %w{index}{f', %b{index}' * bias}) : {dtype}[s0, {n}]"]
        lines += [f"%z{index} = aten.relu(%y{index}) : {dtype}[s0, {n}]"]
    types = ", ".join(f"{dtype}[s0, {n}]" for n in columns)
    outputs = ", ".join(f"%z{index}" for index in range(len(columns)))
    head = f"func @m(%x: {dtype}[s0, {k}]) -> ({types}) where s0 in 1.. {{"
    return Graph.parse("\n".join([head, *lines, f"return {outputs}", "}"]))


def merged(graph: Graph) -> list[list[str]]:
    """The parts of each merged linear."""
    found: dict[str, list[str]] = {}
    for op in graph.ops("aten.slice.Tensor"):
        if op.loc.made_by == "merge-linears":
            found.setdefault(op["self"].name, []).append(op.result.name)
    return list(found.values())


# Codes and scales

QUANTIZERS = [
    (Fp8Tile(), (128, 128)),
    (Fp8Tile(w_format=Format(DType.f8e4m3fn, (64, 128))), (64, 128)),
    (Quantize(), (1, ALL)),
    (Quantize(INT8_ROW, INT8_ROW), (1, ALL)),
    (Fp8Tile(replace(FP8_TILE, profile="ue8m0"), replace(FP8_BLOCK, profile="ue8m0")), (128, 128)),
]


@pytest.mark.parametrize(("quantize", "block"), QUANTIZERS, ids=lambda each: str(each))
@pytest.mark.parametrize("columns", [(256, 128, 128), (384, 200), (128, 128, 1000), (640, 640)])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_codes_and_scales_are_those_of_the_parts(
    quantize: Quantize, block: tuple[int, int], columns: tuple[int, ...], dtype: str
) -> None:
    whole, parts = siblings(*columns, dtype=dtype), siblings(*columns, dtype=dtype)
    inputs, weights = random_inputs(whole, 1, {"s0": 5})
    generator = torch.Generator().manual_seed(0)
    for index, n in enumerate(columns):  # each with its own scale
        factors = torch.rand(n, 1, generator=generator) * 3 * (index + 1)
        weights[f"l{index}.weight"] *= factors.to(weights[f"l{index}.weight"].dtype)
    whole.weights, parts.weights = dict(weights), dict(weights)
    rest = Pipeline.parse("share-quantize; fuse-linear; fold-constants; dead-code")
    run_pipeline(Pipeline((MergeLinears(quantize.w_format), quantize, *rest)), whole, instruments=[CheckChanged()])
    run_pipeline(Pipeline((quantize, *rest)), parts)
    assert merged(whole) == [[f"y{index}" for index in range(len(columns))]]
    (matmul,) = whole.ops("quant.linear")
    codes, scale = (whole.weights[str(matmul[name].op.attrs["name"])] for name in ("w", "w_scale"))
    separate = [(op["w"], op["w_scale"]) for op in parts.ops("quant.linear")]
    for at, got in enumerate((codes, scale)):
        want = [parts.weights[str(pair[at].op.attrs["name"])] for pair in separate]
        assert torch.equal(got.float(), torch.cat(want).float())
    for got, want in zip(interpret(whole, inputs), interpret(parts, inputs), strict=True):
        # The order of FP32 sums; in bf16, one of them may be rounded to the other neighbor.
        assert difference(got, want) < (1e-12 if dtype == "f32" else 2**-16 / got.numel())
    biases = {name for name in whole.weights if "bias" in name}
    assert len(biases) == 1 and not whole.ops("aten.cat"), "biases are concatenated once, not in each call"


@settings(max_examples=25)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(0, 3))
def test_blocks_never_span_two_parts(blocks: list[int], rest: int) -> None:
    columns = [128 * n for n in blocks]
    columns[-1] += 37 * rest
    generator = torch.Generator().manual_seed(sum(columns))
    parts = [torch.randn(n, 130, generator=generator) * (index + 1) for index, n in enumerate(columns)]
    codes, scale = numerics.quantize(torch.cat(parts), numerics.format_of((128, 128)))
    separate = [numerics.quantize(part, numerics.format_of((128, 128))) for part in parts]
    assert torch.equal(codes.float(), torch.cat([each.float() for each, _ in separate]))
    assert torch.equal(scale, torch.cat([each for _, each in separate]))
    plan = MergeLinears().plan(siblings(*columns, k=128))
    assert [len(group) for group in plan.groups] == [len(columns)]


# Selection

HEAD = """
func @m(%x: f32[s0, 128], %z: f32[s0, 128], %vector: f32[256]) -> (f32[s0, 256], f32[s0, 256]) where s0 in 1.. {
  %w1 = core.param() {name = "a.weight"} : f32[256, 128]
  %w2 = core.param() {name = "b.weight"} : f32[256, 128]
  %v = core.param() {name = "v"} : f32[256]
"""
TAIL = "\n  %one = aten.relu(%a) : f32[s0, 256]\n  %two = aten.neg(%b) : f32[s0, 256]\n  return %one, %two\n}"
A, B = "  %a = aten.linear(%x, %w1) : f32[s0, 256]\n", "  %b = aten.linear(%x, %w2) : f32[s0, 256]\n"
OTHER = "  %c = aten.linear(%z, %w3) : f32[s0, 128]\n"
W3 = '  %w3 = core.param() {name = "c.weight"} : f32[128, 128]\n'


@pytest.mark.parametrize(
    ("text", "groups", "reasons"),
    [
        (A + B, [["a", "b"]], {}),
        # Constants and matmuls of the same input may lie between the linears.
        (A + "  %w2n = aten.neg(%w2) : f32[256, 128]\n" + B.replace("%w2", "%w2n"), [["a", "b"]], {}),
        (A + W3 + OTHER.replace("%z", "%x") + B, [["a", "c", "b"]], {}),
        (A + W3 + "  %c = aten.mm(%w3, %w3) : f32[128, 128]\n" + B, [["a", "b"]], {}),
        (
            A + W3 + OTHER + B, [],
            dict.fromkeys("ab", "a matmul of another input lies between %a and %b"),
        ),
        (A + B.replace("%x", "%z"), [], {}),
        (
            A + B.replace("%w2", "%w2, %v"), [],
            dict.fromkeys("ab", "of %a and %b, only one has a bias"),
        ),
        (
            A + B.replace("%w2", "%w2, %vector"), [],
            {"a": "no other linear of its input can be merged", "b": "its bias is computed from the inputs (%vector)"},
        ),
        (
            A + B.replace("%w2", "%w1"), [],
            dict.fromkeys("ab", "its weight has other users, so both copies would be stored (%w1)"),
        ),
        (
            A + B + "  %t = aten.t(%w2) : f32[128, 256]\n  %e = aten.mm(%x, %t) : f32[s0, 256]\n",
            [],
            {"a": "no other linear of its input can be merged",
             "b": "its weight has other users, so both copies would be stored (%w2)"},
        ),
    ],
)  # fmt: skip
def test_which_linears_are_merged(text: str, groups: list[list[str]], reasons: dict[str, str]) -> None:
    graph = Graph.parse(HEAD + text + TAIL)
    assert MergeLinears().explain(graph) == reasons
    inputs, weights = random_inputs(graph, 0, {"s0": 3})
    before = interpret(graph, inputs, weights)
    assert MergeLinears().run(graph) == bool(groups)
    graph.verify()
    assert merged(graph) == groups
    assert all(difference(*pair) < 1e-12 for pair in zip(interpret(graph, inputs, weights), before, strict=True))
    text_after = str(graph)
    assert not MergeLinears().run(graph) and str(graph) == text_after


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("%v16 = aten._to_copy(%v) {dtype = bf16} : bf16[256]", "the biases of %a and %b are f32 and bf16"),
        ("%w16 = aten._to_copy(%w2) {dtype = bf16} : bf16[256, 128]", "the weights of %a and %b are f32 and bf16"),
    ],
)
def test_types_that_differ(line: str, why: str) -> None:
    second = B.replace("%w2", "%w2, %v16") if "v16" in line else B.replace("%w2", "%w16, %v")
    graph = Graph.parse(HEAD + A.replace("%w1", "%w1, %v") + f"  {line}\n" + second + TAIL)
    assert MergeLinears().explain(graph) == {"a": why, "b": why}
    assert not MergeLinears().run(graph)


INSIDE = "{} has 192 columns, so that {} would begin inside a block of the weight"
NOBODY, FEW = "no other linear of its input can be merged", "it has 64 columns, fewer than 128"
LEFT_OUT = "the pattern '!l1' excludes it"
ONE_SCALE = "its weight has one scale, which all merged layers would have to share"


@pytest.mark.parametrize(
    ("columns", "options", "groups", "reasons"),
    [
        ((192, 128, 128), {}, [["y1", "y2"]], {"y0": INSIDE.format("%y0", "%y1")}),
        ((256, 192, 192), {}, [["y0", "y1"]], {"y2": INSIDE.format("%y1", "%y2")}),
        ((192, 192), {}, [], dict.fromkeys(("y0", "y1"), INSIDE.format("%y0", "%y1"))),
        ((192, 192), {"w_format": Format(DType.f8e4m3fn, (64, 128))}, [["y0", "y1"]], {}),
        ((192, 129), {"w_format": FP8_ROW}, [["y0", "y1"]], {}),
        ((192, 64), {"w_format": FP8_ROW}, [], {"y0": NOBODY, "y1": FEW}),
        ((192, 64), {"w_format": FP8_ROW, "min_columns": 64}, [["y0", "y1"]], {}),
        ((256, 256), {"w_format": FP8_TENSOR}, [], dict.fromkeys(("y0", "y1"), ONE_SCALE)),
        ((256, 256), {"layers": ("*", "!l1")}, [], {"y0": NOBODY, "y1": LEFT_OUT}),
        ((256, 256, 256), {"layers": ("*", "!l1")}, [["y0", "y2"]], {"y1": LEFT_OUT}),
    ],
)
def test_sizes_and_options(
    columns: tuple[int, ...], options: dict[str, Any], groups: list[list[str]], reasons: dict[str, str]
) -> None:
    graph = siblings(*columns)
    step = MergeLinears(**options)
    assert step.explain(graph) == reasons
    assert step.run(graph) == bool(groups) and merged(graph) == groups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_columns": 0}, "option 'min_columns' of pass 'merge-linears' is too small: got 0; need 1 or more"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        MergeLinears(**options)


def test_a_pattern_that_names_nothing_is_an_error() -> None:
    with pytest.raises(PassError, match="a pattern matches no matmul's weight: got 'l7'"):
        MergeLinears(layers=("*", "!l7")).run(siblings(128, 128))


class Tied(dict[str, torch.Tensor]):
    """A store in which two names share one tensor."""

    ties = {"l0.weight": ("l0.weight", "l1.weight"), "l1.weight": ("l0.weight", "l1.weight")}  # noqa: RUF012


def test_a_tied_weight_is_not_stored_twice() -> None:
    graph = siblings(128, 128, 128)
    _, weights = random_inputs(graph)
    graph.weights = Tied(weights)
    reasons = MergeLinears().explain(graph)
    assert reasons.keys() == {"y0", "y1", "y2"} and "so both copies would be stored (%w1)" in reasons["y1"]


def test_a_router_is_not_merged() -> None:
    text = str(siblings(256, 128, 128)).replace("aten.relu(%y1) : f32[s0, 128]", "aten.argsort(%y1) : i64[s0, 128]")
    graph = Graph.parse(text.replace("f32[s0, 128], f32[s0, 128])", "i64[s0, 128], f32[s0, 128])"))
    assert MergeLinears().explain(graph) == {}
    assert MergeLinears().run(graph) and merged(graph) == [["y0", "y2"]]


# With other passes


def test_its_declared_effect_holds_and_its_text_parses() -> None:
    graph = siblings(256, 128, 130, dtype="bf16")
    inputs, graph.weights = random_inputs(graph, 3, {"s0": 4})
    step: Pass = MergeLinears()
    run_pipeline(Pipeline((step,)), graph, instruments=[Validate(), CheckChanged()], inputs=inputs)
    assert Pass.parse(str(MergeLinears(w_format=FP8_ROW, min_columns=7))) == MergeLinears(FP8_ROW, min_columns=7)
    (matmul,) = graph.ops("aten.linear")
    assert matmul.result.name == "y0_merged" and str(matmul.result.type) == "bf16[s0, 514]"


class Counting(dict[str, torch.Tensor]):
    """A store that counts the bytes that it holds, and their maximum."""

    most = 0

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        super().__setitem__(name, tensor)
        self.most = max(self.most, sum(held.nbytes for held in self.values()))

    def update(self, *pairs: Any, **more: Any) -> None:
        for name, tensor in dict(*pairs, **more).items():
            self[name] = tensor


def test_originals_are_released_group_by_group() -> None:
    lines = []
    for layer in range(8):
        for index in range(2):
            lines.append(f'%w{layer}.{index} = core.param() {{name = "{layer}.{index}.weight"}} : f32[128, 128]')
            lines.append(f"%y{layer}.{index} = aten.linear(%h{layer}, %w{layer}.{index}) : f32[3, 128]")
        lines.append(f"%h{layer + 1} = aten.add.Tensor(%y{layer}.0, %y{layer}.1) : f32[3, 128]")
    body = "\n".join(["%h0 = aten.relu(%x) : f32[3, 128]", *lines, "%z = aten.neg(%h8) : f32[3, 128]"])
    graph = Graph.parse(f"func @m(%x: f32[3, 128]) -> (f32[3, 128]) {{\n{body}\nreturn %z\n}}")
    _, weights = random_inputs(graph)
    graph.weights = store = Counting(weights)
    model = sum(tensor.nbytes for tensor in weights.values())
    for step in Pipeline.parse("merge-linears; fp8-tile; share-quantize; fuse-linear; fold-constants; dead-code"):
        step.run(graph)
    assert len(graph.ops("quant.linear")) == 8 and len(store) == 16
    assert store.most <= model + 2 * 128 * 129, "no more than one group is held twice"
    assert {name for name in store if name.endswith("_q")} == {f"{layer}.0.weight_merged_q" for layer in range(8)}
