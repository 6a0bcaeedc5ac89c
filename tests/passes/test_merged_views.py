"""Users of the parts of a merged linear: views that the strides allow, and values that must not be parts."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.fusing.merge_linears import MergeLinears
from qcompiler.interpreter import interpret
from qcompiler.ir import Graph
from qcompiler.testing import difference, random_inputs


def user_after(reader: str, type: str) -> Graph:
    """q and k: one operation uses k, and a sum uses its result; k has two heads of 64."""
    return Graph.parse(
        f"""
func @m(%x: f32[s0, s1, 128]) -> (f32[s0, s1, 128], {type}) where s0 in 1.., s1 in 1.. {{
  %wq = core.param() {{name = "q.weight"}} : f32[128, 128]
  %wk = core.param() {{name = "k.weight"}} : f32[128, 128]
  %s0 = aten.sym_size.int(%x, 0) : int(s0)
  %s1 = aten.sym_size.int(%x, 1) : int(s1)
  %q = aten.linear(%x, %wq) : f32[s0, s1, 128]
  %k = aten.linear(%x, %wk) : f32[s0, s1, 128]
  %one = aten.neg(%q) : f32[s0, s1, 128]
  {reader}
  return %one, %two
}}"""
    )


@pytest.mark.parametrize(
    ("reader", "type", "why"),
    [
        ("%two = aten.view(%k, [%s0, %s1, 2, 64]) : {t}", "f32[s0, s1, 2, 64]", "is an output of the graph"),
        ("%v = aten.transpose.int(%k, 0, 1) : f32[s1, s0, 128]\n  %two = aten.permute(%v, [2, 0, 1]) : {t}",
         "f32[128, s1, s0]", "is an output of the graph"),
        ("%v = aten.view(%k, [%s0, %s1, 64, 2]) : f32[s0, s1, 64, 2]\n"
         "  %c = aten.view_as_complex(%v) : c64[s0, s1, 64]\n  %two = aten.abs(%c) : {t}",
         "f32[s0, s1, 64]", "aten.view_as_complex reads it"),
        ("%v = aten.view.dtype(%k, i32) : i32[s0, s1, 128]\n  %two = aten.neg(%v) : {t}", "i32[s0, s1, 128]",
         "aten.view.dtype reads it and may need contiguous strides"),
        ("%n = aten.sym_stride.int(%k, 1) : int\n  %two = aten.mul.Tensor(%one, %n) : {t}", "f32[s0, s1, 128]",
         "aten.sym_stride.int reads it"),
    ],
)  # fmt: skip
def test_values_that_must_not_be_parts(reader: str, type: str, why: str) -> None:
    graph = user_after(reader.replace("{t}", type), type)
    reasons = MergeLinears().explain(graph)
    assert why in reasons["k"] and reasons["q"] == "no other linear of its input can be merged"
    assert not MergeLinears().run(graph)


def test_a_part_that_is_written_to_a_buffer_stays_whole() -> None:
    text = str(user_after("%two = aten.neg(%k) : f32[s0, s1, 128]", "f32[s0, s1, 128]"))
    text = text.replace("%wq =", '%cache = core.buffer() {name = "cache"} : f32[s0, s1, 128]\n  %wq =')
    graph = Graph.parse(text.replace("  return", "  core.update(%cache, %k)\n  return"))
    assert "it is an output of the graph" in MergeLinears().explain(graph)["k"]


SAFE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "%s0, %s1, 2, 64 : [s0, s1, 2, 64]": lambda k: k.view(*k.shape[:2], 2, 64),
    "-1, 128 : [s0*s1, 128]": lambda k: k.view(-1, 128),
    "%s1, %s0, 8, 16 : [s1, s0, 8, 16]": lambda k: k.view(k.shape[1], k.shape[0], 8, 16),
}
UNSAFE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "%s0, -1 : [s0, 128*s1]": lambda k: k.view(k.shape[0], -1),
    "%s0, -1, 32 : [s0, 4*s1, 32]": lambda k: k.view(k.shape[0], -1, 32),
    "-1 : [128*s0*s1]": lambda k: k.view(-1),
}


@pytest.mark.parametrize("spec", [*SAFE, *UNSAFE])
def test_a_view_stays_a_view_only_if_rows_stay_separate(spec: str) -> None:
    sizes, shape = spec.split(" : ")
    reader = f"%v = aten.view(%k, [{sizes}]) : f32{shape}\n  %two = aten.neg(%v) : f32{shape}"
    graph = user_after(reader, f"f32{shape}")
    inputs, weights = random_inputs(graph, 0, {"s0": 2, "s1": 3})
    assert MergeLinears().run(graph)
    assert graph["v"].op.name == ("aten.view" if spec in SAFE else "aten.reshape")
    k = torch.nn.functional.linear(inputs[0], weights["k.weight"])
    assert difference(interpret(graph, inputs, weights)[1], -(SAFE | UNSAFE)[spec](k)) < 1e-12


def split(y: torch.Tensor) -> torch.Tensor:
    return y.view(*y.shape[:-1], 2, y.shape[-1] // 2)


STEPS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "split": ("aten.view", split),
    "join": ("aten.view", lambda y: y.view(*y.shape[:-2], y.shape[-2] * y.shape[-1])),
    "rows": ("aten.view", lambda y: y.view(y.shape[0] * y.shape[1], *y.shape[2:])),
    "transpose": ("aten.transpose.int({}, 0, 1)", lambda y: y.transpose(0, 1)),
    "heads": ("aten.transpose.int({}, -2, -3)", lambda y: y.transpose(-2, -3)),
    "unsqueeze": ("aten.unsqueeze({}, 1)", lambda y: y.unsqueeze(1)),
    "slice": ("aten.slice.Tensor({}, 1, 0, 1)", lambda y: y[:, :1]),
}


@settings(max_examples=60)
@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=7), st.integers(1, 3), st.integers(1, 3))
def test_any_chain_of_views_works_after_a_part(steps: list[str], rows: int, length: int) -> None:
    y = torch.empty(rows, length, 128)
    lines: list[str] = []
    for at, step in enumerate(steps):
        op, function = STEPS[step]
        try:
            y = function(y)
        except (RuntimeError, IndexError):
            continue  # chains that do not run without merging are not valid
        before = lines[-1].split()[0] if lines else "%k"
        call = op.format(before) if "{}" in op else f"{op}({before}, {[*y.shape]})"
        lines.append(f"%v{at} = {call} : f32{[*y.shape]}")
    last = lines[-1].split()[0] if lines else "%k"
    graph = user_after("\n  ".join([*lines, f"%two = aten.neg({last}) : f32{[*y.shape]}"]), f"f32{[*y.shape]}")
    inputs, weights = random_inputs(graph, 0, {"s0": rows, "s1": length})
    want = interpret(graph, inputs, weights)
    assert MergeLinears().run(graph)
    assert all(difference(*pair) < 1e-12 for pair in zip(interpret(graph, inputs, weights), want, strict=True))
