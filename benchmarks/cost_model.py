"""What 8 and 16 GPUs would take for Llama-3-405B and DeepSeek-V3: measured kernels, and links measured with two GPUs.

    python benchmarks/cost_model.py

A GEMM takes the time of the nearest measured shape, scaled by the bound of its arithmetic or its bytes. Experts and
attention take their measured rates. The rest of a layer (norms, rotary embeddings, appends) takes what Llama-3-8B's
layers took besides, by tokens and width. Communication adds to that: nothing overlaps. All are times on one H200.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from codegen.peer_memory import MOST_SENT

RESULTS = Path(__file__).parent / "results"
PEAK, COPY = 1979e12, 4.19e12
"""FP8 operations a second, nominal, and bytes of a copy a second, measured."""

ATTENTION = 0.7
"""Share of the copy bandwidth at which attention reads a cache: `h200-decode-attention.md`, 64 x 2048."""


class Links(NamedTuple):
    """Connections of an H200 host. Those to other hosts are assumptions.

    Attributes:
        inside: Bytes a second that a GPU sends to others of its host in a large sum.
        outside: Bytes a second that a GPU sends to another host: 80% of a port of 400 Gbit/s for each GPU.
        start: Seconds that a collective of NCCL takes for few bytes, in a host.
        start_outside: The same across hosts, in addition.
        start_peers: Seconds that a sum through the memory of other GPUs takes for few bytes.
    """

    inside: float
    outside: float
    start: float
    start_outside: float
    start_peers: float


class Linear(NamedTuple):
    """A GEMM of a layer; `cut` divides its columns (n) or rows (k) among the ranks, or leaves it whole on each."""

    n: int
    k: int
    cut: str


class Experts(NamedTuple):
    """Experts of a layer, divided among the ranks; `chosen` for each token."""

    number: int
    chosen: int
    width: int


@dataclass(frozen=True)
class Layer:
    """The GEMMs of a layer, and its attention.

    Attributes:
        linears: Its GEMMs.
        heads: Query heads, divided among the ranks.
        sizes: Elements of a head in scores, and in results, for a prompt.
        latent: Elements of a cached latent, which each rank holds whole and each head reads; 0 for keys and values.
        groups: Heads of keys and values, divided among the ranks as far as they go.
        experts: Its experts.
    """

    linears: tuple[Linear, ...]
    heads: int
    sizes: tuple[int, int]
    latent: int = 0
    groups: int = 0
    experts: Experts | None = None


@dataclass(frozen=True)
class Model:
    """Layers with their number, the width of the residual stream, and the vocabulary."""

    name: str
    layers: tuple[tuple[int, Layer], ...]
    width: int
    vocabulary: int


class Layout(NamedTuple):
    """Ranks that share one copy of a model, and the hosts on which they are; `copies` serve other requests."""

    name: str
    ranks: int
    hosts: int = 1
    copies: int = 1


def llama(name: str, layers: int, width: int, inner: int, heads: int, groups: int, size: int = 128) -> Model:
    linears = (
        Linear((heads + 2 * groups) * size, width, "columns"), Linear(width, heads * size, "rows"),
        Linear(2 * inner, width, "columns"), Linear(width, inner, "rows"),
    )  # fmt: skip
    return Model(name, ((layers, Layer(linears, heads, (size, size), groups=groups)),), width, 128256)


def deepseek_v3() -> Model:
    width, heads = 7168, 128
    attention = (
        Linear(1536 + 576, width, "whole"), Linear(heads * 192, 1536, "columns"), Linear(heads * 256, 512, "columns"),
        Linear(width, heads * 128, "rows"),
    )  # fmt: skip
    dense = (Linear(2 * 18432, width, "columns"), Linear(width, 18432, "rows"))
    shared = (Linear(2 * 2048, width, "columns"), Linear(width, 2048, "rows"))
    sizes, latent = (192, 128), 576
    experts = Layer((*attention, *shared), heads, sizes, latent, experts=Experts(256, 8, 2048))
    layers = ((3, Layer((*attention, *dense), heads, sizes, latent)), (58, experts))
    return Model("DeepSeek-V3", layers, width, 129280)


LLAMA_8B = llama("Llama-3-8B", 32, 4096, 14336, 32, 8)
LLAMA_405B = llama("Llama-3-405B", 126, 16384, 53248, 128, 8)
ONE = Layout("one GPU", 1)
CASES = (
    (LLAMA_405B, Layout("tp=8", 8)),
    (LLAMA_405B, Layout("tp=8, 2 copies", 8, copies=2)),
    (LLAMA_405B, Layout("tp=16", 16, hosts=2)),
    (deepseek_v3(), Layout("tp=8, ep=8", 8)),
    (deepseek_v3(), Layout("tp=8, ep=8, 2 copies", 8, copies=2)),
    (deepseek_v3(), Layout("tp=16, ep=16", 16, hosts=2)),
)  # fmt: skip


# Measured


def rows_of(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return found


@cache
def gemms() -> tuple[tuple[tuple[int, int, int], float], ...]:
    """Shape -> the share of its bound that was reached; with weights that no cache holds, if that was measured."""
    found = []
    for row in rows_of("h200-gemm"):
        m, n, k = (int(size) for size in row["M, N, K"].split(", "))
        cold = row["cold us, ours"]
        seconds = cold * 1e-6 if cold else 2 * m * n * k / (row["qcompiler"] * 1e12)
        found.append(((m, n, k), bound(m, n, k) / seconds))
    return tuple(found)


def bound(m: int, n: int, k: int) -> float:
    """The least seconds of a GEMM: its operations, or its bytes with results in bf16."""
    return max(2 * m * n * k / PEAK, (n * k + m * k + 2 * m * n) / COPY)


@cache
def linear(m: int, n: int, k: int) -> float:
    """Seconds of a GEMM."""

    def distance(measured: tuple[tuple[int, int, int], float]) -> float:
        return sum(math.log(a / b) ** 2 for a, b in zip(measured[0], (m, n, k), strict=True))

    return bound(m, n, k) / min(gemms(), key=distance)[1]


@cache
def expert_rates() -> tuple[tuple[float, float, float], ...]:
    """Rows of an expert -> operations a second, and bytes of weights a second, of DeepSeek-V3's experts."""
    found = []
    for row in rows_of("h200-grouped"):
        if row["model"] == "DeepSeek-V3 gate, up" and row["routing"] == "even":
            found.append((row["tokens"] * 8 / 256, row["TFLOP/s"] * 1e12, row["TB/s of weights"] * 1e12))
    return tuple(sorted(found))


def experts(tokens: int, layer: Experts, width: int, ranks: int) -> float:
    """Seconds of a rank's experts, if tokens are spread evenly."""
    hit = layer.number / ranks * (1 - (1 - layer.chosen / layer.number) ** tokens)
    weights = 3 * layer.width * width
    operations = 2 * weights * tokens * layer.chosen / ranks
    mean = tokens * layer.chosen / layer.number
    rates = expert_rates()
    rate = rates[0][1] if mean <= rates[0][0] else rates[-1][1]
    for (low, slow, _), (high, fast, _) in pairwise(rates):
        if low < mean <= high:
            rate = slow * (fast / slow) ** (math.log(mean / low) / math.log(high / low))
    return max(operations / rate if mean > rates[0][0] else 0.0, hit * weights / rates[0][2])


@cache
def attention_rate() -> float:
    """Operations a second of torch's causal attention for 4096 tokens and 32 heads of 128."""
    rows = rows_of("h200-whole-model-kernels")
    us = next(row["us"] for row in rows if "sdpa" in row["kernel"] and row["model"].startswith("Mixtral"))
    return float(prompt_operations(4096, 32, (128, 128)) / (us * 1e-6))


def prompt_operations(tokens: int, heads: float, sizes: Sequence[int]) -> float:
    return tokens * tokens * heads * sum(sizes)


def measured_links() -> Links:
    """The links of a host, as two GPUs measured them."""
    rows = rows_of("h200-many-gpus-links-2")
    return Links(
        inside=1e9 * max(row["GB/s"] for row in rows), outside=0.8 * 50e9, start=1e-6 * min(row["us"] for row in rows),
        start_outside=30e-6, start_peers=1e-6 * min(row["peer memory us"] or math.inf for row in rows),
    )  # fmt: skip


LINKS = measured_links()


# Estimated


def all_reduce(size: float, layout: Layout, links: Links) -> float:
    """Seconds to add tensors of `size` bytes: inside each host, across hosts with a part on each GPU, inside again.

    Small tensors of one host go to all of its GPUs directly.
    """
    if layout.ranks == 1:
        return 0.0
    inside = layout.ranks // layout.hosts
    if layout.hosts == 1 and (sent := (inside - 1) * size) <= MOST_SENT:
        return links.start_peers + sent / links.inside
    seconds = links.start + 2 * (inside - 1) / inside * size / links.inside
    if layout.hosts > 1:
        across = 2 * (layout.hosts - 1) / layout.hosts * size / inside / links.outside
        seconds += links.start_outside + across
    return seconds


def cut(each: Linear, ranks: int) -> tuple[int, int]:
    """Columns and rows of a rank's part."""
    return (
        -(-each.n // ranks) if each.cut == "columns" else each.n,
        -(-each.k // ranks) if each.cut == "rows" else each.k,
    )


def weights(model: Model, ranks: int) -> float:
    """Bytes of a rank: layers in FP8, the embedding and the head in bf16, cut by columns."""
    total = 2 * 2 * model.width * model.vocabulary / ranks
    for count, layer in model.layers:
        own = sum(math.prod(cut(each, ranks)) for each in layer.linears)
        own += 0 if layer.experts is None else 3 * layer.experts.width * model.width * layer.experts.number // ranks
        total += count * own
    return total


def kernels(model: Model, layout: Layout, batch: int, tokens: int, context: int) -> float:
    """Seconds of the GEMMs, experts and attention of a call, for `tokens` of each row after `context` others."""
    ranks, rows = layout.ranks, batch * tokens
    seconds = linear(batch, -(-model.vocabulary // ranks), model.width) * 2  # in bf16: twice the bytes
    for count, layer in model.layers:
        own = sum(linear(rows, *cut(each, ranks)) for each in layer.linears)
        if layer.experts is not None:
            own += experts(rows, layer.experts, model.width, ranks)
        heads = layer.heads / ranks
        if tokens > 1:
            own += batch * prompt_operations(tokens, heads, layer.sizes) / attention_rate()
        else:
            position = layer.latent or 2 * -(-layer.groups // ranks) * layer.sizes[0]
            operations = 2 * batch * context * heads * (2 * layer.latent)
            own += max(batch * context * position / (ATTENTION * COPY), operations / attention_rate())
        seconds += count * own
    return seconds


@cache
def rest(batch: int, tokens: int) -> float:
    """Seconds of a layer's other kernels for one element of the residual stream, from what Llama-3-8B took in all."""
    if tokens > 1:
        known, taken = 4096, rows_of("h200-prefill")[0]["fp8_tile ms"] / 1e3
        left = float(taken - kernels(LLAMA_8B, ONE, 1, 4096, 0))
    else:
        found = [row for row in rows_of("h200-decoding") if row["context"] == 2048]
        row = min(found, key=lambda row: abs(math.log(row["batch"] / batch)))
        known = row["batch"]
        left = float(row["fp8_tile ms"] / 1e3 - kernels(LLAMA_8B, ONE, known, 1, 2048))
    return max(left, 0.0) / (32 * known * LLAMA_8B.width)


def seconds(
    model: Model, layout: Layout, batch: int, tokens: int, context: int, links: Links = LINKS, width: float = 2.0
) -> tuple[float, float]:  # fmt: skip
    """A call's estimated time, and the part of it that is communication: two sums a layer, and the logits.

    `width` is the mean number of bytes of an element of a sum, each time that it is sent.
    """
    layers, rows = sum(count for count, _ in model.layers), batch * tokens
    sent = 2 * layers * all_reduce(width * rows * model.width, layout, links)
    sent += all_reduce(2 * batch * model.vocabulary, layout, links) / 2  # gathered: half of a sum
    other = layers * rest(batch, tokens) * rows * model.width
    return kernels(model, layout, batch, tokens, context) + other + sent, sent


def estimates(links: Links = LINKS, width: float = 2.0) -> list[dict[str, Any]]:
    """A row for each case: a prompt of 4096 tokens, and decode steps after 2048 tokens. `width`: see `seconds`."""
    rows = []
    for model, layout in CASES:
        row: dict[str, Any] = {
            "model": model.name, "GPUs": layout.ranks * layout.copies, "layout": layout.name,
            "GB": f"{weights(model, layout.ranks) / 1e9:.0f}",
        }  # fmt: skip
        calls = {"prompt": (1, 4096, 0), "batch 1": (1, 1, 2048), "batch 64": (64, 1, 2048)}
        for name, call in calls.items():
            whole, sent = seconds(model, layout, *call, links, width)
            row[f"{name}, ms"] = f"{1e3 * whole:.1f}"
            row[f"{name}, sent"] = f"{100 * sent / whole:.0f}%"
        row["tokens/s"] = f"{layout.copies * 64 / whole:.0f}"
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Rows in columns."""
    cells = [list(rows[0]), *(list(map(str, row.values())) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in cells)


def main() -> None:
    print(table(estimates()))


if __name__ == "__main__":
    main()
