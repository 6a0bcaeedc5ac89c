"""Schemes: named recipes that parse, and messages for those that do not exist."""

import pytest

from qcompiler.errors import PassError
from qcompiler.ir import Graph
from qcompiler.pass_runner import run_pipeline
from qcompiler.schemes import SCHEMES, Scheme, all_schemes, find, pipeline, register


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_is_a_pipeline_in_its_own_spelling(name: str) -> None:
    assert str(pipeline(name)) == SCHEMES[name].pipeline
    assert SCHEMES[name].doc.endswith(".")
    assert find(name) is all_schemes()[name] is SCHEMES[name]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_that_has_run_has_nothing_left_to_do(name: str) -> None:
    graph = Graph.parse(
        "func @m(%x: f32[s0, 256]) -> (f32[s0, 64]) where s0 in 0.. {\n"
        '  %w = core.param() {name = "w"} : f32[256, 64]\n'
        "  %y = aten.matmul(%x, %w) : f32[s0, 64]\n  return %y\n}"
    )
    run_pipeline(pipeline(name), graph)
    text = str(graph)
    run_pipeline(pipeline(name), graph)
    assert str(graph) == text


@pytest.mark.parametrize("name", ["fp8-tile", "fp8_tyle", "fp8"])
def test_did_you_mean(name: str) -> None:
    with pytest.raises(PassError) as error:
        pipeline(name)
    assert str(error.value).startswith(f"no such scheme: got '{name}'. Did you mean 'fp8_tile'? Known: fp8_tile")


def test_a_name_is_taken_once() -> None:
    assert register(SCHEMES["fp8_tile"]) is SCHEMES["fp8_tile"]
    with pytest.raises(PassError, match="two schemes have one name: got 'fp8_tile'"):
        register(Scheme("fp8_tile", "Another.", "dead-code"))
