"""Placements in types and meshes: text, local types, and the verifier's rules."""

import pytest

from qcompiler.errors import ParseError, QCompilerError, VerifyError
from qcompiler.ir import DType, Graph, Mesh, Partial, Shard, TensorType, parse_type

ROWS = "bf16[1024, 512]<tp = shard(axis = 0, parts = 2, unit = 128)>"


@pytest.mark.parametrize(
    "text",
    [
        ROWS,
        "f32[s0, 8]<tp = shard(axis = 1, parts = 4)>",
        "f32[8]<tp = shard(axis = 0, parts = 2, copies = 3)>",
        "f32[s0]<tp = partial(parts = 2)>",
        "f32[8, 8]<dp = shard(axis = 0, parts = 2), tp = partial(parts = 4)>",
        "bf16[s0, 256]",
    ],
)
def test_types_round_trip(text: str) -> None:
    assert str(parse_type(text)) == text


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ("tp = cut(axis = 0, parts = 2)", "no such placement: got 'cut'. Known: partial, shard"),
        ("tp = shard(axis = 0)", "the parts of the placement 'shard' is missing"),
        ("tp = partial(parts = 2, axis = 0)", "the placement 'partial' has no field 'axis'"),
        ("tp = shard(axis = 0, axis = 1)", "the axis of a placement is given twice"),
        ("tp = partial(parts = 1)", "the parts of a placement is wrong: got 1; need an integer from 2"),
        ("tp = shard(axis = -1, parts = 2)", "the axis of a placement is wrong: got -1; need an integer from 0"),
        ("tp = partial(parts = 2), tp = partial(parts = 2)", "the placement on 'tp' is given twice"),
        ("tp", "expected '='"),
    ],
)
def test_wrong_placements(placement: str, message: str) -> None:
    with pytest.raises(ParseError) as error:
        parse_type(f"f32[8]<{placement}>")
    assert message in str(error.value)


def test_what_one_rank_holds() -> None:
    kind = parse_type(ROWS)
    assert isinstance(kind, TensorType)
    assert str(kind.local) == "bf16[512, 512]"
    assert str(kind.whole) == "bf16[1024, 512]"
    assert str(kind.stored) == "bf16[1024, 512]"
    assert kind.placement("tp") == Shard(0, 2, 128)
    assert kind.placement("dp") is None
    assert str(kind.placed("tp", Shard(0, 2, copies=4)).local) == "bf16[512, 512]"
    both = kind.placed("dp", Partial(2))
    assert str(both) == "bf16[1024, 512]<dp = partial(parts = 2), tp = shard(axis = 0, parts = 2, unit = 128)>"
    assert both.partials == {"dp"}
    assert both.placed("tp", None).placed("dp", None) == TensorType(DType.bf16, (1024, 512))


def graph(w: str = "", y: str = "", z: str = "", last: str = "aten.relu(%y)") -> Graph:
    return Graph.parse(
        f"""func @m(%x: f32[s0, 8]) -> (f32[s0, 12]{z}) where s0 in 1..9 {{
  %w = core.param() {{name = "w"}} : f32[12, 8]{w}
  %y = aten.linear(%x, %w) : f32[s0, 12]{y}
  %z = {last} : f32[s0, 12]{z}
  return %z
}}"""
    )


def test_a_cut_must_leave_whole_units_of_a_fixed_axis() -> None:
    graph(w="<tp = shard(axis = 0, parts = 4, unit = 3)>").verify()
    for placement, message in (
        ("axis = 0, parts = 8", "the 12 elements of axis 0 cannot be cut into 8 equal parts"),
        (
            "axis = 0, parts = 2, unit = 4",
            "the 12 elements of axis 0 cannot be cut into 2 equal parts of whole units of 4",
        ),
        ("axis = 2, parts = 2", "it has no axis 2"),
    ):
        with pytest.raises(VerifyError, match=rf"V18: core.param: %w is cut along 'tp', but {message}"):
            graph(w=f"<tp = shard({placement})>").verify()
    with pytest.raises(VerifyError, match=r"V18: aten.linear: .*, but the size of axis 0 is s0, which is not fixed"):
        graph(y="<tp = shard(axis = 0, parts = 2)>").verify()


def test_a_partial_sum_must_be_added_before_it_is_read() -> None:
    partial = "<tp = partial(parts = 2)>"
    with pytest.raises(VerifyError, match=r"V19: aten.relu: %y is a partial sum along 'tp', which a collective must"):
        graph(y=partial).verify()
    graph(y=partial, last='coll.all_reduce(%y) {mesh = "tp"}').verify()
    with pytest.raises(VerifyError, match=r"V19: core.return: %z is a partial sum along 'tp'"):  # not at the view
        graph(y=partial, z=partial, last="aten.alias(%y)").verify()


def test_type_rules_see_whole_tensors() -> None:
    text = """
func @m(%q: f32[1, 4, s0, 8]{0}, %k: f32[1, 2, s0, 8], %f: f32[4]{1}) -> (f32[1, 4, s0, 8]{0}) where s0 in 1..9 {{
  %o = attention.causal(%q, %k, %k, None, %f) {{scale = 0.5}} : f32[1, 4, s0, 8]{0}
  return %o
}}"""
    Graph.parse(text.format("<tp = shard(axis = 1, parts = 2)>", "<tp = shard(axis = 0, parts = 2)>")).verify()


def test_meshes() -> None:
    mesh = Mesh.parse("dp=2, tp=3")
    assert str(mesh) == "dp=2, tp=3"
    assert mesh.size == 6
    assert [mesh.place(4, axis) for axis in ("dp", "tp")] == [1, 1]
    assert mesh.group(4, "tp") == (3, 4, 5)
    assert mesh.group(4, "dp") == (1, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "this is not a mesh: got ''; need axes and their sizes, such as tp=2"),
        ("tp", "this is not a mesh"),
        ("tp=2, tp=2", "an axis of a mesh has a wrong name: got 'tp'"),
        ("tp=0", "the size of mesh axis 'tp' is wrong: got 0; need a positive integer"),
    ],
)
def test_wrong_meshes(text: str, message: str) -> None:
    with pytest.raises(QCompilerError) as error:
        Mesh.parse(text)
    assert message in str(error.value)


def test_a_mesh_has_an_axis() -> None:
    with pytest.raises(QCompilerError, match="a mesh needs an axis"):
        Mesh(())
    with pytest.raises(QCompilerError, match=r"the mesh has no such axis: got 'pp'\. Did you mean 'tp'"):
        Mesh.parse("tp=2").length("pp")
