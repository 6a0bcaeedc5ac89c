"""The cost model of many GPUs gives what one GPU took, and its communication follows from the links."""

import pytest

from benchmarks.cost_model import (
    CASES,
    LINKS,
    LLAMA_8B,
    LLAMA_405B,
    ONE,
    Layout,
    Links,
    all_reduce,
    bound,
    deepseek_v3,
    estimates,
    gemms,
    linear,
    rows_of,
    seconds,
    weights,
)


@pytest.mark.parametrize("row", rows_of("h200-decoding"), ids=lambda row: f"{row['batch']} x {row['context']}")
def test_decoding_of_llama_3_8b(row: dict[str, float]) -> None:
    whole, sent = seconds(LLAMA_8B, ONE, int(row["batch"]), 1, int(row["context"]))
    assert sent == 0.0 and 1e3 * whole == pytest.approx(row["fp8_tile ms"], rel=0.07)


def test_prefill_of_llama_3_8b() -> None:
    whole, _ = seconds(LLAMA_8B, ONE, 1, 4096, 0)
    assert 1e3 * whole == pytest.approx(rows_of("h200-prefill")[0]["fp8_tile ms"])


def test_a_measured_gemm_takes_its_time() -> None:
    for (m, n, k), share in gemms():
        assert linear(m, n, k) == pytest.approx(bound(m, n, k) / share) and 0 < share < 1.05


def test_sums_over_links() -> None:
    links = Links(inside=1e6, outside=1e5, start=1.0, start_outside=2.0, start_peers=0.25)
    assert all_reduce(8e6, ONE, links) == 0.0
    assert all_reduce(8e6, Layout("", 8), links) == pytest.approx(1.0 + 2 * 7 / 8 * 8.0)
    assert all_reduce(8e6, Layout("", 16, hosts=2), links) == pytest.approx(1.0 + 14.0 + 2.0 + 8e6 / 8 / 1e5)
    assert all_reduce(2e5, Layout("", 8), links) == pytest.approx(0.25 + 7 * 0.2)


def test_bytes_of_a_rank() -> None:
    assert weights(LLAMA_405B, 1) == pytest.approx(405.9e9 + 2 * 128256 * 16384, rel=5e-3)
    assert weights(deepseek_v3(), 1) == pytest.approx(671e9, rel=0.01)
    assert weights(LLAMA_405B, 8) == pytest.approx(weights(LLAMA_405B, 1) / 8)


def test_smaller_sums_and_faster_links_save_time() -> None:
    for model, layout in CASES:
        whole, sent = seconds(model, layout, 1, 4096, 0)
        half, less = seconds(model, layout, 1, 4096, 0, width=1.0)
        assert whole - sent == pytest.approx(half - less) and sent / 2 < less < 0.6 * sent
        fast = LINKS._replace(inside=2 * LINKS.inside, outside=2 * LINKS.outside)
        assert seconds(model, layout, 1, 4096, 0, fast)[0] < whole
    assert len(estimates()) == len(CASES)
