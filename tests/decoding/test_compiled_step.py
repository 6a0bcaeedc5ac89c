"""The step of a compiled model: equal to the interpreter, over caches that it keeps between calls."""

from pathlib import Path

import pytest
import torch
from tiny_decoder import ids, tiny, whole, with_caches

from qcompiler.artefact.loading import read_program, reading
from qcompiler.artefact.saving import write_artefact
from qcompiler.artefact.weight_files import SHARD_BYTES
from qcompiler.compiler.model import CompiledModel
from qcompiler.decoding.step import CompiledStep, compiled_step
from qcompiler.errors import InputError, QCompilerError
from qcompiler.ir import Graph
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.program.program import Program, Settings, build_program, graph_as_captured

ZERO = torch.zeros(1, dtype=torch.int64)


def program(graph: Graph, passes: str = "") -> Program:
    return build_program(graph_as_captured(graph), Settings(Pipeline.parse(passes), "cpu", strict=False), None)


@pytest.fixture(scope="module")
def step() -> CompiledStep:
    return compiled_step(program(with_caches(tiny())))


def test_the_source_calls_operators_on_caches(step: CompiledStep) -> None:
    source = program(with_caches(tiny())).host.source
    assert "def tiny(weights, input_ids, slots, lengths, last):" in source
    assert "kernels.append_to_cache(weights.layers_0, k3, v2, slots, lengths)" in source
    assert (
        "= kernels.attend_to_cache(weights.layers_0, q3, slots, lengths, None, None, None, 0.5, None, None, None)"
        in source
    )
    assert "2 kernel calls" in source
    assert (step.vocabulary, step.slots, step.capacity, step.device) == (32, 3, 16, torch.device("cpu"))


def test_tokens_continue_their_slots(step: CompiledStep) -> None:
    tokens = ids(2, 10)
    want = whole(tiny(), tokens)
    step.reset()
    step(tokens[:1, :4], ZERO + 2, ZERO, ZERO + 3)
    step(tokens[1:, :2], ZERO, ZERO, ZERO + 1)
    lengths, slots = torch.tensor([4, 2]), torch.tensor([2, 0])
    for _ in range(6):
        got = step(tokens[torch.arange(2), lengths][:, None], slots, lengths, torch.zeros(2, dtype=torch.int64))
        torch.testing.assert_close(got, want[torch.arange(2), lengths], rtol=1e-5, atol=1e-5)
        lengths += 1


def test_two_steps_share_caches(step: CompiledStep) -> None:
    """Logits of all tokens of a chunk that continues what the other step has stored."""
    tokens = ids(1, 10)
    every = compiled_step(program(with_caches(tiny(), logits="all")), step.caches)
    step(tokens[:, :6], ZERO, ZERO, ZERO + 5)
    got = every(tokens[:, 6:], ZERO, ZERO + 6, ZERO + 3)
    torch.testing.assert_close(got, whole(tiny(), tokens)[:, 6:], rtol=1e-5, atol=1e-5)


def test_a_saved_step_loads_again(step: CompiledStep, tmp_path: Path) -> None:
    made, tokens = program(tiny(), "kv-cache{format=int8, slots=2, capacity=8}"), ids(1, 5)
    write_artefact(tmp_path / "step", made, SHARD_BYTES)
    with reading(tmp_path / "step") as folder:
        loaded = read_program(folder, None, True, False, ())
    assert str(loaded.graph) == str(made.graph) and loaded.host == made.host
    arguments = tokens, ZERO, ZERO, ZERO + 4
    assert torch.equal(compiled_step(loaded)(*arguments), compiled_step(made)(*arguments))


def test_a_compiled_model_names_what_runs_its_graph() -> None:
    compiled = CompiledModel(program(with_caches(tiny())))
    with pytest.raises(QCompilerError, match="reads key-value caches, which a call does not pass"):
        compiled(ids(1, 1), ZERO, ZERO, ZERO)


def test_errors(step: CompiledStep) -> None:
    with pytest.raises(InputError, match="row 0 does not fit into the cache: got length 14 and 3 more positions"):
        step(ids(1, 3), ZERO, ZERO + 14, ZERO)
    with pytest.raises(QCompilerError, match="the program has no key-value cache"):
        compiled_step(program(tiny()))
    with pytest.raises(QCompilerError, match=r"the cache 'layers\.0' does not fit the program"):
        compiled_step(program(with_caches(tiny(), capacity=8)), step.caches)
