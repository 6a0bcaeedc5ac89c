"""Matmuls that store their rows in the memory of other GPUs, on one GPU: what the parts and the sum cost.

    python benchmarks/linear_scatter.py [--out FOLDER]

"matmul" is the whole matmul alone. "stored" is a matmul for the rows of each rank, the kernel that opens inboxes, and
the sum of what all ranks have stored; here the memory of each rank is this GPU's own, so links are not measured. "sent"
is what a link must carry meanwhile. "exchange" is what the sum would take after the matmul, between two H200s
(`h200-many-gpus-links-2.json`), and "gain" what two GPUs would save.
"""

from itertools import pairwise
from typing import Any

import harness
import torch

from benchmarks.cost_model import rows_of
from benchmarks.sanitizing.ranks import inboxes_of_ranks, reaching
from codegen.inboxes import slot_bytes
from codegen.launching.timing import in_turns
from codegen.templates.template import ceil_div
from qcompiler.distributed.communicator import communicating

WIDTH, HEADS, INNER = 8192, 8192, 28672
CASES = ((2, 1024), (2, 2048), (2, 4096), (2, 8192), (4, 4096), (8, 4096), (8, 16384))
"""Ranks and tokens of layers of Llama-3-70B."""


def exchange_us(size: float) -> float:
    """Microseconds of a sum of `size` bytes over two GPUs, through peer memory, between measured sizes."""
    low, high = next(pair for pair in pairwise(rows_of("h200-many-gpus-links-2")) if size <= pair[1]["bytes"])
    share = (size - low["bytes"]) / (high["bytes"] - low["bytes"])
    return float(low["peer memory us"] + share * (high["peer memory us"] - low["peer memory us"]))


def measure(ranks: int, tokens: int, k: int) -> dict[str, Any]:
    """One row of the table."""
    x, w = (torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for n in (tokens, WIDTH))
    quantize, e4m3 = torch.ops.qcompiler.quantize, torch.float8_e4m3fn
    linear = (
        *quantize(x, [1, 128], e4m3, "deepseek", "col_major", None),
        *quantize(w, [128, 128], e4m3, "deepseek", "row_major", None),
        None, [1, 128], [128, 128], torch.bfloat16,
    )  # fmt: skip
    rows = ceil_div(tokens, ranks)
    boxes = inboxes_of_ranks(ranks * slot_bytes(rows, WIDTH, torch.bfloat16), x.device, ranks)[0]
    alone = reaching(boxes)

    def stored() -> object:
        with communicating(alone):
            return torch.ops.qcompiler.linear_scatter_tokens(*linear, "tp", ranks, 512)

    times = in_turns(
        {"matmul": [lambda: torch.ops.qcompiler.scaled_linear(*linear)], "stored": [stored]}, rounds=7, budget=12.0
    )
    sent = (ranks - 1) * rows * WIDTH * 2
    row: dict[str, Any] = {
        "ranks": ranks, "M, N, K": f"{tokens}, {WIDTH}, {k}", "matmul us": times["matmul"],
        "stored us": times["stored"], "cost": times["stored"] / times["matmul"],
        "sent GB/s": sent / times["stored"] / 1e3, "exchange us": None, "gain us": None,
    }  # fmt: skip
    if ranks == 2:
        row["exchange us"] = exchange_us(sent)
        row["gain us"] = times["matmul"] + row["exchange us"] - times["stored"]
    return row


def main() -> None:
    harness.arguments()
    torch.manual_seed(0)
    rows = [measure(ranks, tokens, k // ranks) for ranks, tokens in CASES for k in (HEADS, INNER)]
    harness.gpu_report("linear-scatter", "Matmuls of a layer of Llama-3-70B that store rows for other ranks", rows)


if __name__ == "__main__":
    main()
