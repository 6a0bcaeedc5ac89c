"""Sampling: exact distributions, equality with transformers' processors, and independence of the batch."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qcompiler.decoding.noise import gumbel, hashed
from qcompiler.decoding.sampling import Features, Sampling, SamplingTable
from qcompiler.decoding.vocabulary import VocabularyParts
from qcompiler.distributed.simulation import Simulation
from qcompiler.ir import Mesh

CPU = torch.device("cpu")
ALL = Features(penalty=True, noise=True, filters=True)
DRAWS = 20_000


def drawn(logits: torch.Tensor, sampling: Sampling, count: int, features: Features | None = None) -> torch.Tensor:
    """The tokens at positions 0 to count - 1 for the same logits f32[V]."""
    table = SamplingTable(1, len(logits), CPU)
    table.enter(torch.tensor([0]), [sampling], [[0]])
    slots = torch.zeros(count, dtype=torch.int64)
    rows = logits.expand(count, -1)
    return table.choose(rows, slots, torch.arange(count), features or Features.of([sampling]))


def chi_square(counts: torch.Tensor, shares: torch.Tensor) -> float:
    """The statistic in standard deviations from its mean; tokens without share must not be drawn."""
    assert counts[shares == 0].sum() == 0
    wanted = shares[shares > 0].double() * counts.sum()
    assert float(wanted.min()) > 5, "the test needs expected counts above 5"
    statistic = ((counts[shares > 0] - wanted) ** 2 / wanted).sum()
    freedom = len(wanted) - 1
    return float((statistic - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 0.9, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_frequencies_are_those_of_transformers_probabilities(settings: dict[str, Any]) -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(1))
    temperature = settings["temperature"]
    processors: Any = LogitsProcessorList()  # its types ask for classes that torch no longer has
    processors.append(TemperatureLogitsWarper(temperature))
    if "top_k" in settings:
        processors.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        processors.append(TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        processors.append(MinPLogitsWarper(settings["min_p"]))
    shares = processors(torch.zeros(1, 1, dtype=torch.int64), logits[None]).softmax(-1)[0]
    counts = drawn(logits, Sampling(**settings, seed=5), DRAWS).bincount(minlength=20)
    assert abs(chi_square(counts, shares)) < 4


def test_seeds_give_independent_samples() -> None:
    """One draw from each of many seeds has the right frequencies, and so has each of many pairs of seeds."""
    logits = torch.randn(6, generator=torch.Generator().manual_seed(2))
    seeds = torch.arange(DRAWS)
    noise = gumbel(seeds, torch.full((DRAWS,), 9), 6)
    tokens = (logits + noise).argmax(-1)
    assert abs(chi_square(tokens.bincount(minlength=6), logits.softmax(-1))) < 4
    pairs = tokens[0::2] * 6 + tokens[1::2]
    both = (logits.softmax(-1)[:, None] * logits.softmax(-1)).flatten()
    assert abs(chi_square(pairs.bincount(minlength=36), both)) < 4


def test_noise_has_the_moments_of_a_gumbel_distribution() -> None:
    noise = gumbel(torch.arange(50), torch.arange(50), 2000).double()
    assert abs(float(noise.mean()) - 0.57722) < 0.02
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.05
    assert noise.isfinite().all()
    assert len(gumbel(torch.tensor([3]), torch.tensor([1]), 5000).unique()) > 4900


def test_hashes_are_those_of_splitmix64() -> None:
    """The first outputs of the reference implementation for seed 1234567."""
    state = torch.tensor(1234567) + torch.arange(1, 4) * (0x9E3779B97F4A7C15 - (1 << 64))
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(each) % (1 << 64) for each in hashed(state)] == wanted


def test_a_repetition_penalty_equals_that_of_transformers() -> None:
    steps = torch.randn(12, 1, 30, generator=torch.Generator().manual_seed(3))
    prompt = [4, 9, 9, 1]
    table = SamplingTable(2, 30, CPU)
    slot = torch.tensor([1])
    table.enter(slot, [Sampling(repetition_penalty=1.7)], [prompt])
    seen = list(prompt)
    for position, logits in enumerate(steps):
        wanted = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), logits).argmax(-1)
        new = table.choose(logits, slot, torch.tensor([position]), Features(penalty=True))
        assert new.tolist() == wanted.tolist()
        seen.append(int(new))
    assert len(set(seen)) > 8
    table.enter(slot, [Sampling(repetition_penalty=1.7)], [[2]])
    assert table.seen[1].nonzero().flatten().tolist() == [2], "a new sequence forgets the old one"


def test_a_row_is_the_same_alone_and_in_any_batch() -> None:
    """Bit for bit: neighbors with other settings switch features on, which must not change rows without them."""
    samplings = [
        Sampling(), Sampling(temperature=0.8, seed=1), Sampling(temperature=1.2, top_p=0.7, seed=2),
        Sampling(temperature=1.0, top_k=3, seed=1), Sampling(repetition_penalty=1.4),
        Sampling(temperature=2.0, min_p=0.1, repetition_penalty=0.8, seed=-5),
    ]  # fmt: skip
    logits = torch.randn(40, 6, 50, generator=torch.Generator().manual_seed(4)) * 2

    def tokens(chosen: list[int], features: Features) -> torch.Tensor:
        table = SamplingTable(6, 50, CPU)
        slots = torch.tensor(chosen)
        table.enter(slots, [samplings[row] for row in chosen], [[row, 7] for row in chosen])
        return torch.stack(
            [table.choose(step[chosen], slots, slots * 0 + at, features) for at, step in enumerate(logits)]
        )

    together = tokens([0, 1, 2, 3, 4, 5], ALL)
    for row, sampling in enumerate(samplings):
        assert torch.equal(tokens([row], Features.of([sampling]))[:, 0], together[:, row])
    assert torch.equal(tokens([3, 0, 5], ALL), together[:, [3, 0, 5]])


def test_equal_logits_at_the_border_of_top_k_all_stay() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    assert set(drawn(logits, Sampling(temperature=1.0, top_k=2), 500).tolist()) == {1, 2, 3}
    assert set(drawn(logits, Sampling(temperature=1.0, top_k=1), 50).tolist()) == {1}
    assert set(drawn(logits, Sampling(temperature=1.0, top_p=1e-9), 50).tolist()) == {1}
    assert set(drawn(logits, Sampling(temperature=1.0, min_p=1.0), 50).tolist()) == {1}


def test_low_precision_logits_are_computed_in_fp32() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(6)).bfloat16()
    sampling = Sampling(temperature=0.6, top_p=0.9, seed=3)
    assert torch.equal(drawn(logits, sampling, 100), drawn(logits.float(), sampling, 100))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 4), st.integers(1, 5), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_parts_of_the_vocabulary_choose_what_the_whole_chooses(
    ranks: int, batch: int, penalty: bool, noise: bool, filters: bool, seed: int
) -> None:
    """Ranks exchange candidates, or all logits if a row excludes tokens; of equal logits, the first wins."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 4, (batch, 12 * ranks), generator=generator).to(torch.bfloat16)
    row: dict[str, Any] = {"temperature": 0.8, "seed": seed} if noise or filters else {}
    row |= ({"top_k": 3} if filters else {}) | ({"repetition_penalty": 1.7} if penalty else {})
    rows = [Sampling(**row) if at % 2 == 0 else Sampling() for at in range(batch)]
    slots, positions = torch.arange(batch), torch.arange(batch) + seed % 97
    tables = [SamplingTable(batch, 12 * ranks, CPU) for _ in range(2)]
    parts = VocabularyParts(logits.chunk(ranks, 1), Simulation(Mesh((("tp", ranks),))).run, "tp")
    chosen = []
    forms: list[torch.Tensor | VocabularyParts] = [logits, parts]
    for table, form in zip(tables, forms, strict=True):
        table.enter(slots, rows, [[1, 2, 3]] * batch)
        chosen.append(table.choose(form, slots, positions, Features.of(rows)))
    assert torch.equal(*chosen) and torch.equal(tables[0].seen, tables[1].seen)
