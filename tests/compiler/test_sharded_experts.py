"""Mixtures of experts on a mesh: ranks choose for their own tokens, and exchange choices and tokens."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import MODELS
from mixture_graph import mixture_on
from rank_processes import run_on_two_ranks

import qcompiler
from qcompiler.capture import capture
from qcompiler.ir import Graph
from qcompiler.pass_manager.instruments import relative_error

SIZES: dict[str, Any] = {
    "hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 1,
}  # fmt: skip
TACTICS = "tp; ep; sp{tokens=8}"
CHOSEN = "tp; ep{send=chosen}; sp{tokens=8}"
OWN = "tp{layers=['*', '!shared*']}".replace("'", '"')  # the shared expert is whole on each rank
SHAPES = ((1, 1), (1, 7), (1, 8), (2, 11), (3, 8))


@cache
def captured(name: str) -> Graph:
    torch.manual_seed(0)
    model = MODELS[name](**SIZES).to(torch.bfloat16).eval()
    return capture(model, (ids_of((2, 12)),)).graph


@cache
def compiled(name: str, scheme: str, ranks: int, sharding: str) -> Any:
    return qcompiler.compile(
        captured(name), scheme=scheme, mesh=qcompiler.simulated_mesh(tp=ranks), sharding=sharding, progress=False
    )


def ids_of(shape: tuple[int, int]) -> torch.Tensor:
    return torch.arange(shape[0] * shape[1]).reshape(shape) * 11 % 96


@pytest.mark.parametrize(("name", "ranks"), [("mixtral", 2), ("mixtral", 4), ("qwen3", 2)])
def test_ranks_choose_for_their_own_tokens(name: str, ranks: int) -> None:
    """Equal bits: each rank computes the same choices as all of them did."""
    found, plain = compiled(name, "fp8_tile", ranks, TACTICS), compiled(name, "fp8_tile", ranks, "tp; ep")
    (chosen,) = found.graph.ops("aten.topk")
    assert str(chosen.results[0].type).startswith("f32[share(s0*s1, ")
    codes = [op for op in found.graph.ops("coll.all_gather_tokens") if op.result.name.startswith("view")]
    assert [str(op.result.tensor.dtype) for op in codes] == ["f8e4m3fn", "f32"]
    for shape in SHAPES:
        assert torch.equal(found(ids_of(shape)), plain(ids_of(shape))), shape


@pytest.mark.parametrize(("name", "ranks"), [("mixtral", 2), ("mixtral", 4), ("qwen3", 4)])
def test_ranks_send_only_the_tokens_that_others_need(name: str, ranks: int) -> None:
    found, plain = compiled(name, "fp8_tile", ranks, CHOSEN), compiled(name, "fp8_tile", ranks, TACTICS)
    kinds = [str(op.result.tensor.dtype) for op in found.graph.ops("coll.gather_chosen_tokens")]
    assert kinds == ["f8e4m3fn", "f32"] and len(found.graph.ops("coll.reduce_scatter_chosen_tokens")) == 1
    for shape in SHAPES:
        assert torch.equal(found(ids_of(shape)), plain(ids_of(shape))), shape


def tokens_of(count: int) -> torch.Tensor:
    return torch.randn(count, 256, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize("favorites", [(), (0, 1), (0, 7), (2, 5)])
def test_ranks_that_no_token_chooses(favorites: tuple[int, ...]) -> None:
    """All tokens choose the same two experts, so that some ranks have no token, or one rank has all of them."""
    x = tokens_of(37)
    for ranks in (2, 4):
        plain, found = (
            mixture_on(qcompiler.simulated_mesh(tp=ranks), each.replace("tp", OWN, 1), favorites)
            for each in (TACTICS, CHOSEN)
        )
        assert len(list(found.graph.ops("coll.gather_chosen_tokens"))) == 1
        for tokens in (1, 7, 8, 37):
            assert torch.equal(plain(x[:tokens]), found(x[:tokens]))


def test_choices_that_are_limited_to_groups() -> None:
    """As in DeepSeek-V3; on four ranks, the groups are what ranks have, so that a token is sent to one of them."""
    x, mesh = tokens_of(37), qcompiler.simulated_mesh(tp=4)
    plain, found = (mixture_on(mesh, each.replace("tp", OWN, 1), limited=True) for each in (TACTICS, CHOSEN))
    assert str(found.graph["left_part"].type) == "bf16[share(s0, 4, 8), 8]"
    assert found.skipped["send-chosen"] == {}
    for tokens in (7, 8, 37):
        assert torch.equal(plain(x[:tokens]), found(x[:tokens]))


def test_shared_experts() -> None:
    """On a rank's own tokens if they are whole on each rank; otherwise they need all tokens."""
    mesh = qcompiler.simulated_mesh(tp=2)
    whole, cut = mixture_on(mesh, CHOSEN.replace("tp", OWN, 1)), mixture_on(mesh, CHOSEN)
    assert whole.skipped["send-chosen"] == {}
    assert str(whole.graph["e_part"].type) == "bf16[share(s0, 2, 8), 256]"
    assert cut.skipped["send-chosen"] == {"v": "aten.linear reads all tokens, too"}
    x = tokens_of(19)
    assert relative_error(whole(x), cut(x)) < 1e-2


def test_two_processes(tmp_path: Path) -> None:
    script = f'''
from mixture_graph import mixture_on
x = torch.randn(21, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
for favorites in ((), (0, 1)):
    found[str(favorites)] = mixture_on(mesh, """{CHOSEN}""", favorites)(x)
'''
    ranks = run_on_two_ranks(script, tmp_path)
    for favorites in ((), (0, 1)):
        whole = mixture_on(qcompiler.simulated_mesh(tp=2), CHOSEN, favorites)(tokens_of(21))
        assert all(torch.equal(rank[str(favorites)], whole) for rank in ranks)


def test_what_is_not_sent_in_reports() -> None:
    """Remarks say what is expected; reasons say why all tokens are sent."""
    found = compiled("mixtral", "fp8_tile", 4, CHOSEN)
    remarks = {row.remark for row in found.report.rows}
    assert any("ranks receive and return only tokens that chose its experts: 50% are expected" in r for r in remarks)
    many = compiled("qwen3", "fp8_tile", 2, CHOSEN)
    (why,) = many.skipped["send-chosen"].values()
    assert why == "with 4 of 8 experts on 2 ranks, each rank is expected to need 98.6% of the tokens"
    alone = compiled("mixtral", "fp8_tile", 2, "tp; ep{send=chosen}")
    assert "all tokens of the sum are on each rank: put sp after ep" in alone.skipped["send-chosen"].values()


def test_sums_as_codes_send_all_terms() -> None:
    found, plain = (compiled("mixtral", "fp8_tile", 4, f"{each[:-1]}, sums=fp8_tile}}") for each in (CHOSEN, TACTICS))
    assert not list(found.graph.ops("coll.reduce_scatter_chosen_tokens"))
    assert len(list(found.graph.ops("coll.gather_chosen_tokens"))) == 2
    assert torch.equal(found(ids_of((2, 11))), plain(ids_of((2, 11))))
