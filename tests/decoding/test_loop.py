"""The loop over slots: equal to transformers' own generate, whatever the batch, the chunks and the queue."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import decoding_models as models
import pytest
import torch
from decoding_models import RecomputingStep
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qcompiler.decoding.graphs import Decode, DirectDecode, RecordedDecode, batch_sizes, padded
from qcompiler.decoding.loop import CHUNK, Loop, Produced
from qcompiler.decoding.requests import Request
from qcompiler.decoding.sampling import Features, Sampling
from qcompiler.decoding.slot_table import Rows, SlotTable
from qcompiler.decoding.vocabulary import VocabularyParts
from qcompiler.distributed.simulation import Simulation
from qcompiler.errors import InputError
from qcompiler.ir import Mesh

PROMPTS = [[5, 9, 31], [7, 7], [11, 3, 4, 60, 22, 13, 8], [1], [40, 41, 42, 43]]


class FakeRecorder:
    """Records the function itself; a replay must not depend on anything but the tensors that it captured."""

    nbytes = 0

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        run()
        out = run().clone()
        self.recorded += 1

        def replay() -> Tensor:
            return out.copy_(run())

        return replay


def generated(
    step: RecomputingStep, requests: Sequence[Request], *, recorder: FakeRecorder | None = None, **options: Any
) -> list[list[int]]:
    table = SlotTable(step)
    decode: Decode = DirectDecode(table) if recorder is None else RecordedDecode(table, recorder)
    return collected(Loop(table, decode, **options).run(requests), len(requests))


def collected(produced: Any, count: int) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(count)]
    ended = [False] * count
    for each in produced:
        assert isinstance(each, Produced)
        assert not ended[each.request]
        found[each.request].append(each.token)
        ended[each.request] = each.ended
    assert all(ended)
    return found


@pytest.mark.parametrize("make", [models.llama, models.qwen3, models.gpt2])
def test_greedy_equals_transformers(make: Callable[[], Any]) -> None:
    model = make()
    wanted = models.greedy_tokens(model, PROMPTS, 12)
    assert len({token for each in wanted for token in each}) > 8, "the test is blind if all tokens are equal"
    for slots, chunk, lag in [(1, CHUNK, 0), (3, 2, 0), (5, 4, 1), (8, CHUNK, 2)]:
        step = RecomputingStep(model, slots=slots, capacity=24)
        assert generated(step, [Request(prompt, 12) for prompt in PROMPTS], chunk=chunk, lag=lag) == wanted


@pytest.mark.parametrize("lag", [0, 1])
def test_rows_that_end_give_their_slots_to_waiting_prompts(lag: int) -> None:
    model = models.llama()
    full = generated(RecomputingStep(model), [Request(prompt, 12) for prompt in PROMPTS])
    stops = [full[0][3], full[1][1], full[2][7], full[3][0], full[4][5]]
    wanted = [tokens[: tokens.index(stop) + 1] for tokens, stop in zip(full, stops, strict=True)]
    requests = [Request(prompt, 12, ends=stop.__eq__) for prompt, stop in zip(PROMPTS, stops, strict=True)]
    step = RecomputingStep(model, slots=2)
    assert generated(step, requests, lag=lag) == wanted
    decoded = sum(rows for rows, length in step.calls if length == 1)
    assert decoded <= sum(map(len, wanted)) + lag * len(wanted), "ended rows are computed on"


def test_limits_differ_by_row_and_one_token_needs_no_decode() -> None:
    step = RecomputingStep(models.llama())
    found = generated(step, [Request(prompt, limit) for prompt, limit in zip(PROMPTS, (1, 5, 2, 1, 3), strict=True)])
    assert list(map(len, found)) == [1, 5, 2, 1, 3]
    one = RecomputingStep(models.llama())
    generated(one, [Request([3, 4], 1)])
    assert one.calls == [(1, 2)]


def test_the_cache_can_be_filled_to_its_end() -> None:
    """The last new token is never written, and padding never reaches beyond the cache."""
    step = RecomputingStep(models.llama(), slots=2, capacity=10)
    found = generated(step, [Request([3] * 9, 1), Request([4] * 3, 7), Request([5], 9)], chunk=4)
    assert list(map(len, found)) == [1, 7, 9]


def test_a_call_may_have_more_positions_than_a_slot_but_no_longer_rows_than_the_step_takes() -> None:
    step, requests = RecomputingStep(models.llama(), slots=5, capacity=10), [Request([3] * 9, 1) for _ in range(4)]
    generated(step, requests)
    assert step.calls == [(4, 9)]
    step.chunk, step.calls = 6, []  # as with rings
    generated(step, requests)
    assert step.calls == [(1, 6), (1, 3)] * 4


def test_recorded_steps_equal_direct_ones() -> None:
    model, recorder = models.llama(), FakeRecorder()
    samplings = [Sampling(), Sampling(temperature=0.8, seed=3), Sampling(repetition_penalty=1.5),
                 Sampling(temperature=1.0, top_k=9, seed=4), Sampling()]  # fmt: skip
    requests = [Request(prompt, 9, each) for prompt, each in zip(PROMPTS, samplings, strict=True)]
    direct = generated(RecomputingStep(model), requests)
    assert generated(RecomputingStep(model), requests, recorder=recorder) == direct
    assert generated(RecomputingStep(model), requests, recorder=FakeRecorder(), lag=1) == direct
    assert recorder.recorded >= 2


def test_warm_up_records_every_batch_size_once_and_changes_nothing() -> None:
    step, recorder = RecomputingStep(models.llama(), slots=6), FakeRecorder()
    table = SlotTable(step)
    decode = RecordedDecode(table, recorder)
    decode.warm_up()
    decode.warm_up()
    assert recorder.recorded == len(batch_sizes(6)) == 4
    assert not table.tokens.any() and not table.lengths.any() and not table.active.any()


class _Operators(TorchDispatchMode):
    """Lists the operators that run at least one kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def greedy_step(given: Any, largest: Tensor) -> list[str]:
    """Checks a step with two sequences for which a model returns `given`; lists what runs beyond the model."""

    class Ready(RecomputingStep):
        def __call__(self, *inputs: Any, **_: Any) -> Any:
            assert [each.shape for each in inputs] == [(2, 1), (2,), (2,), (2,)]
            return given

    table = SlotTable(Ready(models.llama()))
    rows = Rows.empty(2, table.step.device)
    table.load(rows, [2, 0])
    ran = _Operators()
    with ran:
        new = table.advance(rows, Features())
    assert torch.equal(new, largest)
    return ran.names


def test_what_a_greedy_step_runs_beyond_the_model() -> None:
    """Each operator is one kernel on a GPU, see `codegen.templates.next_tokens`."""
    logits = torch.randn(2, 64)
    assert greedy_step(logits, logits.argmax(-1)) == ["qcompiler.rank_parts.default", "qcompiler.enter_tokens.default"]


def test_what_a_greedy_step_of_ranks_runs_beyond_the_model() -> None:
    """Each rank ranks its columns, and one gather follows, here a concatenation."""
    found: list[list[str]] = []

    def watched(program: Callable[[], Tensor]) -> Tensor:
        with _Operators() as ran:
            out = program()
        found.append(ran.names)
        return out

    def run(programs: Sequence[Callable[[], Tensor]]) -> Sequence[Tensor]:
        return Simulation(Mesh((("tp", 2),))).run([partial(watched, program) for program in programs])

    logits = torch.randn(2, 64)
    parts = VocabularyParts(logits.chunk(2, 1), run, "tp")
    assert greedy_step(parts, logits.argmax(-1)) == ["qcompiler.enter_tokens.default"]
    assert found == [["qcompiler.rank_parts.default", "aten.cat.default"]] * 2


def test_batch_sizes_and_padding() -> None:
    assert [batch_sizes(slots) for slots in (1, 2, 3, 16)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8, 16]]
    assert padded([0, 2], 4, 5) == [0, 2, 1, 1]
    assert padded([1, 0], 2, 2) == [1, 0]


def test_two_runs_at_a_time_are_an_error_and_a_closed_one_frees_the_loop() -> None:
    table = SlotTable(RecomputingStep(models.llama()))
    loop = Loop(table, DirectDecode(table))
    first: Any = loop.run([Request([3, 4], 5)])
    next(first)
    assert torch.is_grad_enabled(), "a suspended run must not change the caller's mode"
    with pytest.raises(InputError, match="the decoder is busy"):
        next(loop.run([Request([3], 1)]))
    first.close()
    assert len(list(loop.run([Request([3], 2)]))) == 2


def test_a_batch_is_greedy_only_if_all_rows_are() -> None:
    assert Features.of([Sampling(), Sampling()]) == Features()
    assert Features.of([Sampling(), Sampling(temperature=1.0, top_p=0.5)]) == Features(noise=True, filters=True)
