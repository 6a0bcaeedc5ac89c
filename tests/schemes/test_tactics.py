"""Shardings print and parse, become passes, and reject what they do not know."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.sharding.sequence_parallel import SequenceParallel
from qcompiler.errors import ParseError, PassError
from qcompiler.ir import Mesh
from qcompiler.ir.formats import FP8_TILE, INT8_ROW
from qcompiler.pass_manager.pipeline import Pipeline
from qcompiler.schemes import pipeline
from qcompiler.schemes.sharded import sharded
from qcompiler.schemes.tactics import ExpertParallelLayers, SequenceParallelNorms, Sharding, Tactic, TensorParallel

PATTERNS = st.lists(st.text("ab.*!_", min_size=1, max_size=6), min_size=1, max_size=3).map(tuple)
AXES = st.sampled_from(("tp", "ep", "inner_1"))
TACTICS: st.SearchStrategy[Tactic] = st.one_of(
    st.builds(TensorParallel, AXES, PATTERNS, st.integers(0, 10**9)),
    st.builds(SequenceParallelNorms, AXES, st.integers(1, 10**6), st.sampled_from((None, FP8_TILE, INT8_ROW))),
    st.builds(ExpertParallelLayers, AXES, PATTERNS),
)


@given(st.lists(TACTICS, min_size=1, max_size=4, unique_by=lambda tactic: (tactic.name, tactic.axis)))
def test_print_and_parse_are_inverse(tactics: list[Tactic]) -> None:
    sharding = Sharding(tuple(tactics))
    assert Sharding.parse(str(sharding)) == sharding


@pytest.mark.parametrize("text", ["tp", "tp; sp; ep", 'tp{axis=inner, layers=["*", "!lm_head"]}; sp{tokens=256}'])
def test_texts_are_kept(text: str) -> None:
    assert str(Sharding.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pp", "no such tactic: got 'pp'"),
        ("tp; tp", "tactic 'tp' is given twice: got along axis 'tp'; need once"),
        ("sp{tokens=many}", "option 'tokens' of tactic 'sp' has a wrong value: got many; need an integer"),
        ("tp{tokens=3}", "tactic 'tp' has no such option: got 'tokens'"),
        ("", "a sharding needs a tactic: need one of tp, sp, ep"),
    ],
)
def test_wrong_texts(text: str, message: str) -> None:
    with pytest.raises((PassError, ParseError), match=message):
        Sharding.parse(text)


def test_passes_of_tactics() -> None:
    sharding = Sharding.parse('tp{layers=["*", "!lm_head"]}; ep; sp{tokens=128}')
    steps = str(sharded(pipeline("fp8_tile"), Mesh.parse("tp=2"), sharding, 1))
    assert (
        'dead-code; split-linears{mesh="tp=2", unit=[128, 128], layers=["*", "!lm_head"]}; '
        'split-norms{mesh="tp=2", unit=[128, 128], layers=["*", "!lm_head"]}; '
        'shard{mesh="tp=2", unit=[128, 128], layers=["*", "!lm_head"]}; collectives; '
        'expert-parallel{mesh="tp=2", rank=1}; sequence-parallel{mesh="tp=2", few=128, reads=#fp8_tile}; '
        'partition{mesh="tp=2", rank=1}; merge-linears'
    ) in steps
    assert "to-kernels; own-rows; fuse-linear-scatter; gather-codes; gather-quantized" in steps
    plain = str(sharded(pipeline("fp8_tile"), Mesh.parse("tp=2"), Sharding.parse("tp"), 0))
    assert "gather-quantized" not in plain and "own-rows" not in plain


def test_chosen_tokens_are_sent_after_all_tactics() -> None:
    sharding = Sharding.parse("tp; ep{send=chosen}; sp")
    assert str(sharding) == "tp; ep{send=chosen}; sp"
    steps = str(sharded(Pipeline.parse("canonicalize; dead-code"), Mesh.parse("tp=2"), sharding, 0))
    assert 'sequence-parallel{mesh="tp=2"}; send-chosen{mesh="tp=2"}; partition{mesh="tp=2"}' in steps
    plain = str(sharded(pipeline("fp8_tile"), Mesh.parse("tp=2"), Sharding.parse("tp; ep; sp"), 0))
    assert "send-chosen" not in plain
    with pytest.raises(PassError, match="option 'send' of tactic 'ep' has a wrong value"):
        Sharding.parse("ep{send=some}")


def test_sums_are_sent_in_a_format_only_if_it_is_given() -> None:
    """A pass after `partition`, and one after the passes that fuse quantizations."""
    sharding = Sharding.parse("tp; sp{sums=fp8_tile}")
    assert str(sharding) == "tp; sp{sums=#fp8_tile}"
    steps = str(sharded(pipeline("fp8_tile"), Mesh.parse("tp=2"), sharding, 0))
    assert 'partition{mesh="tp=2"}; quantize-sums; merge-linears' in steps
    assert "fuse-activation-quantize; fuse-reduce-quantize; fuse-sum-quantize; fuse-epilogue" in steps
    other = Sharding.parse('tp{axis=in}; sp{axis=in, sums=#fp8_tile<profile = "ue8m0">}')
    steps = str(sharded(Pipeline.parse("canonicalize; dead-code"), Mesh.parse("in=2"), other, 1))
    assert steps.endswith('; quantize-sums{axis=in, format=#fp8_tile<profile = "ue8m0">}')
    plain = str(sharded(pipeline("fp8_tile"), Mesh.parse("tp=2"), Sharding.parse("tp; sp"), 0))
    assert "sums" not in plain and "fuse-sum" not in plain
    with pytest.raises(PassError, match="option 'sums' of tactic 'sp' has a wrong value: got fp8_tiles; need a format"):
        Sharding.parse("sp{sums=fp8_tiles}")
    with pytest.raises(PassError, match="in which one scale covers several tokens"):
        sharded(pipeline("fp8_tile"), Mesh.parse("tp=2"), Sharding.parse("tp; sp{sums=fp8_block}"), 0)


def test_wrong_axes_and_values() -> None:
    message = (
        r"tactic 'sp' uses an axis that the mesh does not have: got 'tp'; need one of dp. Name one .*sp\{axis=dp\}"
    )
    with pytest.raises(PassError, match=message):
        sharded(pipeline("fp8_tile"), Mesh.parse("dp=2"), Sharding.parse("tp{axis=dp}; sp"), 0)
    with pytest.raises(PassError, match="option 'tokens' of tactic 'sp' has a wrong value: got 'x'"):
        SequenceParallelNorms(tokens="x")  # type: ignore[arg-type]
    with pytest.raises(PassError, match="option 'tokens' of tactic 'sp' has a wrong value: got 0; need at least 1"):
        Sharding.parse("tp; sp{tokens=0}")
    with pytest.raises(PassError, match="a sharding needs a tactic"):
        Sharding(())
    with pytest.raises(PassError, match="option 'few' of pass 'sequence-parallel' is wrong: got 0"):
        SequenceParallel("tp=2", few=0)


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ("fp8-tile", ", reads=#fp8_tile"),
        ('fp8-tile{layers=["*", "!lm_head"]}', ', reads=#fp8_tile, layers=["*", "!lm_head"]'),
        ('fp8-tile{layers=["*.q"]}; quantize{layers=["*.v"]}', ""),  # the layers differ
        ("canonicalize; dead-code", ""),
    ],
)
def test_the_pass_that_cuts_tokens_knows_in_which_formats_ranks_send_them(steps: str, told: str) -> None:
    mesh = Mesh.parse("tp=2")
    for sums in ("", ", sums=#int8_row"):
        sharding = Sharding.parse(f"tp; sp{{tokens=64{sums}}}")
        found = str(sharded(Pipeline.parse(f"{steps}; to-kernels; fuse-activation-quantize"), mesh, sharding, 0))
        assert f'sequence-parallel{{mesh="tp=2", few=64{told}{sums}}};' in found
        assert str(Pipeline.parse(found)) == found
