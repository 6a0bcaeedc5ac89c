"""The pass kv-cache: any cut of the tokens into calls gives the logits of the whole sequence."""

from functools import partial
from itertools import pairwise
from random import Random

import pytest
import torch
from tiny_decoder import TEXT, ids, tiny, whole, with_caches
from torch import Tensor

from qcompiler.errors import PassError
from qcompiler.interpreter import interpret
from qcompiler.ir import CacheType, DType, Graph
from qcompiler.pass_manager.instruments import Validate
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.runtime.caches import Cache, allocate, cache_types
from qcompiler.testing import verified

assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def new_caches(graph: Graph) -> dict[str, Cache]:
    return {name: allocate(kind, "cpu") for name, kind in cache_types(graph).items()}


def same(size: int, value: int) -> Tensor:
    return torch.full((size,), value)


def test_the_interface() -> None:
    step = verified(with_caches(tiny()))
    assert [f"{value.name}: {value.type}" for value in step.inputs] == [
        "input_ids: i64[s0, s1]", "slots: i64[s0]", "lengths: i64[s0]", "last: i64[s0]",
    ]  # fmt: skip
    (logits,) = step.outputs
    assert str(logits.type) == "f32[s0, 32]"  # type: ignore[union-attr]  # a value
    assert cache_types(step) == {"layers.0": CacheType(DType.f32, 3, 2, 16, 4, 4)}
    assert str(step["scores"].type) == "f32[s0, 32]", "only one token of each row is multiplied by the head"
    assert Graph.parse(str(step)).text() == step.text()


def test_any_cut_gives_the_logits_of_the_whole_sequence() -> None:
    random, graph, tokens = Random(1), tiny(), ids(2, 12)
    want = whole(graph, tokens)
    last, every = with_caches(graph), with_caches(graph, logits="all")
    for _ in range(12):
        cuts = sorted({0, 12, *(random.randint(1, 11) for _ in range(random.randint(0, 12)))})
        caches, slots = new_caches(last), torch.tensor(random.sample(range(3), 2))
        got = list[Tensor]()
        for start, end in pairwise(cuts):
            part, lengths = tokens[:, start:end], same(2, start)
            got += interpret(every, [part, slots, lengths], caches=caches)
            # The same keys and values are written again to the same places.
            (one,) = interpret(last, [part, slots, lengths, same(2, end - start - 1)], caches=caches)
            assert_close(one, got[-1][:, -1])
        assert_close(torch.cat(got, 1), want)


def test_rows_do_not_see_each_other() -> None:
    """Rows of random lengths, padded on the right, in random slots: each gives what it gives alone."""
    random, graph = Random(2), tiny()
    step, tokens = with_caches(graph), ids(3, 12)
    want = whole(graph, tokens)
    together, alone = new_caches(step), new_caches(step)
    slots, lengths = torch.tensor([2, 0, 1]), torch.zeros(3, dtype=torch.int64)
    for _ in range(6):
        counts = torch.tensor([random.randint(1, 2) for _ in range(3)])
        width = int(counts.max())
        part = torch.stack([row[at : at + width] for row, at in zip(tokens, lengths.tolist(), strict=True)])
        part[torch.arange(width) >= counts[:, None]] = random.randrange(32)  # padding
        (got,) = interpret(step, [part, slots, lengths, counts - 1], caches=together)
        for row in range(3):
            pick = slice(row, row + 1)
            inputs = [part[pick], slots[pick], lengths[pick], counts[pick] - 1]
            assert_close(interpret(step, inputs, caches=alone)[0], got[pick])
        lengths = lengths + counts
        assert_close(got, want[torch.arange(3), lengths - 1])


@pytest.mark.parametrize(("format", "limit"), [("fp8", 0.1), ("int8", 0.02)])
def test_formats(format: str, limit: float) -> None:
    graph, tokens = tiny(), ids(2, 12)
    want, step = whole(graph, tokens), with_caches(graph, format=format, logits="all")
    assert cache_types(step)["layers.0"].bytes == 3 * 2 * 16 * 2 * (4 + 4)
    caches = new_caches(step)
    got = [
        interpret(step, [tokens[:, at : at + 1], torch.arange(2), same(2, at)], caches=caches)[0] for at in range(12)
    ]
    assert 0 < (torch.cat(got, 1) - want).norm() / want.norm() < limit


def test_position_ids_may_be_an_input() -> None:
    """Numbers that the model takes are replaced like those that it computes."""
    given = TEXT.replace("%input_ids: i64[s0, s1])", "%input_ids: i64[s0, s1], %position_ids: i64[s0, s1])", 1)
    given = "\n".join(line for line in given.split("\n") if "%place =" not in line)
    given = given.replace("aten.unsqueeze(%place, 0) : i64[1, s1]", "aten.view(%position_ids, [%b, %n]) : i64[s0, s1]")
    for line in ("row", "shifted", "learned", "numbers", "column", "angles", "wide", "cos", "cos1"):
        head = f"%{line} = "
        given = "\n".join(
            row.replace("[1, s1", "[s0, s1").replace("[1, 1, s1", "[s0, 1, s1").replace("[1, -1", "[%b, -1")
            if row.strip().startswith(head)
            else row
            for row in given.split("\n")
        )
    graph = tiny(given)
    step, tokens = with_caches(graph), ids(2, 9)
    want = whole(tiny(), tokens)
    caches = new_caches(step)
    assert [value.name for value in step.inputs] == ["input_ids", "slots", "lengths", "last"]
    for at in range(9):
        (got,) = interpret(step, [tokens[:, at : at + 1], torch.arange(2), same(2, at), same(2, 0)], caches=caches)
        assert_close(got, want[:, at])


@pytest.mark.parametrize(
    "options", ["slots=2, capacity=16, start=true", "capacity=5", "capacity=64, logits=all", "capacity=16, format=int8"]
)
def test_the_instrument_validate_compares_both_interfaces(options: str) -> None:
    validate, pipeline = Validate(), Pipeline.parse(f"kv-cache{{{options}}}")
    run_pipeline(pipeline, tiny(), instruments=[validate], inputs=[ids(2, 9)])
    assert validate.errors["kv-cache"] < (0.02 if "int8" in options else 1e-5)


def test_layers_over_the_same_keys_share_a_cache() -> None:
    twice = TEXT.replace(
        "  %o1 = aten.transpose.int(%o, 1, 2)",
        "  %p = attention.causal(%o, %k3, %v2) {scale = 0.5, window = 3} : f32[s0, 4, s1, 4]\n"
        "  %o1 = aten.transpose.int(%p, 1, 2)",
    )
    graph, tokens = tiny(twice), ids(1, 6)
    step = with_caches(graph)
    assert len(step.ops("state.append")) == 1 and len(step.ops("state.attend")) == 2
    caches, want = new_caches(step), whole(graph, tokens)
    for at in range(6):
        (got,) = interpret(step, [tokens[:, at : at + 1], same(1, 1), same(1, at), same(1, 0)], caches=caches)
        assert_close(got, want[:, at])


OTHER_OUTPUT = (
    ("-> (f32[s0, s1, 32])", "-> (f32[s0, s1, 32], f32[s0, s1, 16])"),
    ("return %logits", "return %logits, %h"),
)
NO_LOGITS = ("-> (f32[s0, s1, 32])", "-> (f32[s0, 4, s1, 4])"), ("return %logits", "return %q3")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            [("%y = aten.linear(%o2, %wo) : f32[s0, s1, 16]",
              '%y = aten.flip(%o2, [1]) : f32[s0, s1, 16] loc("model.py":7 in "mixer")')],
            ["cannot run with a key-value cache", "aten.flip", 'loc("model.py":7 in "mixer")'],
        ),
        (OTHER_OUTPUT, ["more than its logits", "f32[s0, s1, 32], f32[s0, s1, 16]"]),
        (NO_LOGITS, ["the output of the graph is not the logits of each token", "f32[s0, 4, s1, 4]"]),
        (
            [("attention.causal(%q3, %k3, %v2) {scale = 0.5}", "aten.mul.Tensor(%q3, 2.0)")],
            ["no attention to cache", "the pass 'attention' makes"],
        ),
    ],
)  # fmt: skip
def test_refused(changes: list[tuple[str, str]], parts: list[str]) -> None:
    text = TEXT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    graph = tiny(text)
    with pytest.raises(PassError) as error:
        with_caches(graph)
    for part in parts:
        assert part in str(error.value)


def test_options_are_checked() -> None:
    for text, problem in (
        ("slots=0", "option 'slots'"),
        ("format=fp4", "option 'format'"),
        ("logits=first", "'logits'"),
    ):
        name, _, value = text.partition("=")
        with pytest.raises(PassError, match=problem):
            with_caches(tiny(), **{name: value})


def test_learned_positions_limit_the_capacity() -> None:
    with_caches(tiny(), capacity=64)
    with pytest.raises(PassError, match=r"got capacity=65; need at most 64, because %places has 66 rows"):
        with_caches(tiny(), capacity=65)


def test_a_second_run_changes_nothing() -> None:
    step = with_caches(tiny())
    before = str(step)
    assert str(with_caches(step)) == before
