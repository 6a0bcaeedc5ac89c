"""The configuration that `GEMM.family(HOPPER).choose` picks, compared with the fastest of all configurations.

    python benchmarks/heuristic.py [--out FOLDER] [--only KIND]     measures all configurations, or those of one kind
    python benchmarks/heuristic.py --table DEVICE [--out FOLDER]    only rewrites the table from earlier times

Each row of the table is a shape: the chosen configuration, the fastest one, and the ratio of their times (1 is ideal).
Small M is timed twice: warm (one set of operands) and cold (rotating through enough weights that none stays in the
cache). Configurations alternate. Writing the table repeats the choice, so the paces in `codegen.templates`
can be fitted without a GPU.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

from codegen.launching.timing import in_turns
from codegen.targets.hopper import HOPPER
from codegen.templates.gemm import GEMM, GemmConfig, GemmOperands, GemmProblem, Kind, bucket

NAME = "heuristic"
TITLE = "Chosen configurations compared with the fastest: microseconds by CUDA-graph replay, interleaved"

# (N, K) of the layers of Llama-3-8B, Llama-3-70B and DeepSeek-V3.
LAYERS = (
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (10240, 8192), (8192, 8192), (57344, 8192),
    (8192, 28672), (2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048), (576, 7168),
)  # fmt: skip
FEW_LAYERS = ((4096, 4096), (28672, 4096), (4096, 14336), (2112, 7168), (7168, 2048))
ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
FEWER_ROWS = (1, 16, 64, 128, 256, 512, 1024, 4096)

KINDS: dict[str, tuple[Kind, int]] = {
    "tiles": ("tiles", 128), "rows_f8": ("rows_f8", -1), "rows_i8": ("rows_i8", -1), "tiles_64": ("tiles", 64),
    "tiles_32": ("tiles", 32),
}  # fmt: skip

COLD_ROWS, COLD_BYTES = 128, 120_000_000
"""The largest M at which loading weights dominates, and a number of bytes of weights that exceeds the cache."""

Row = dict[str, Any]


def shapes(name: str) -> list[tuple[int, int, int]]:
    rows, layers = (ROWS, LAYERS) if name == "tiles" else (FEWER_ROWS, FEW_LAYERS)
    return [(m, n, k) for m in rows for n, k in layers]


def all_configs(name: str) -> tuple[GemmConfig, ...]:
    kind, x_block = KINDS[name]
    return GEMM.family(HOPPER).configs(GemmProblem(1, 1, 1, kind=kind, x_block=x_block))


def worth_a_try(config: GemmConfig, problem: GemmProblem) -> bool:
    """Drops configurations that cannot win at large M: tiles for few rows, or of 64 columns for N above 1024."""
    few = config.variant in ("narrow", "split") or (config.block_n < 128 and problem.n > 1024)
    return GEMM.family(HOPPER).why_not(config, problem) is None and not (problem.m >= 1024 and few)


def measure(name: str, m: int, n: int, k: int) -> Iterator[Row]:
    """One row per state of the cache: microseconds of each configuration, None if not worth a try."""
    kind, x_block = KINDS[name]
    problem = GemmProblem(m, n, k, kind=kind, x_block=x_block)
    every = GEMM.family(HOPPER).configs(problem)
    tried = [config for config in every if worth_a_try(config, problem)]
    for cold in (False, True) if m <= COLD_ROWS else (False,):
        sets = [_Operands(name, m, n, k) for _ in range(COLD_BYTES // (n * k) + 1 if cold else 1)]
        times = in_turns(
            {config: [each.launch(config) for each in sets] for config in tried}, rounds=3, budget=1.0, most=100
        )
        found = [round(times[config], 2) if config in times else None for config in every]
        yield {"kind": name, "m": m, "n": n, "k": k, "cold": cold, "us": found}


class _Operands:
    def __init__(self, name: str, m: int, n: int, k: int) -> None:
        self.kind, self.x_block = KINDS[name]
        self.x, self.w = (_codes(rows, k, self.kind == "rows_i8") for rows in (m, n))
        self.out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
        if self.kind == "tiles":
            self.xs = torch.rand(-(-k // self.x_block), (m + 3) // 4 * 4, device="cuda")[:, :m].T
            self.ws = torch.rand(-(-n // 128), -(-k // 128), device="cuda")
        else:
            self.xs, self.ws = torch.rand(m, 1, device="cuda"), torch.rand(n, 1, device="cuda")

    def launch(self, config: GemmConfig) -> Callable[[], None]:
        x_block = self.x_block if self.kind == "tiles" else None
        operands = GemmOperands(self.x, self.w, self.out, self.xs, self.ws, x_block=x_block)
        return lambda: GEMM.family(HOPPER).launch(config, operands)


def _codes(rows: int, k: int, integers: bool) -> Tensor:
    """Normally distributed codes; large matrices repeat 16 million of them."""
    count = min(rows * k, 1 << 24)
    values = torch.randn(count, device="cuda")
    codes = (40 * values).clamp(-127, 127).to(torch.int8) if integers else values.to(torch.float8_e4m3fn)
    return codes.view(torch.uint8).repeat(-(-rows * k // count))[: rows * k].view(codes.dtype).view(rows, k)


def _work() -> None:
    """Runs for a second so that the clocks match a device under load from the first measurement."""
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(600):
        torch.mm(square, square)
    torch.cuda.synchronize()


def compared(stored: dict[str, Any]) -> list[Row]:
    """For each shape: the choice, the fastest, and the ratio of their times; None if the choice was not timed."""
    times: dict[tuple[str, int, int, int], dict[bool, dict[str, float]]] = {}
    for row in stored["rows"]:
        found = {config: us for config, us in zip(stored["configs"][row["kind"]], row["us"], strict=True) if us}
        times.setdefault((row["kind"], row["m"], row["n"], row["k"]), {})[row["cold"]] = found
    table = []
    for (name, m, n, k), states in times.items():
        kind, x_block = KINDS[name]
        chosen = str(GEMM.family(HOPPER).choose(GemmProblem(bucket(m), n, k, kind=kind, x_block=x_block)))
        line: Row = {"kind": name, "M, N, K": f"{m}, {n}, {k}", "chosen": chosen}
        for cold, title in ((False, "warm"), (True, "cold")):
            found = states.get(cold, {})
            best = min(found, key=lambda config: found[config]) if found else None
            line[f"{title} best"] = "the same" if best == chosen else best
            line[f"{title} best, us"] = found[best] if best else None
            line[f"{title} ratio"] = found[best] / found[chosen] if best and chosen in found else None
        table.append(line)
    return table


def write_table(stored: dict[str, Any], path: Path) -> None:
    """The table, preceded by how often the choice is good."""
    table = compared(stored)
    lines = [f"# {stored['title']}", "", ", ".join(f"{key} {value}" for key, value in stored["machine"].items()), ""]
    for title in ("warm", "cold"):
        ratios = [line[f"{title} ratio"] for line in table if line[f"{title} ratio"] is not None]
        good = f"{sum(ratio >= 0.9 for ratio in ratios)} of {len(ratios)}"
        lines.append(
            f"{title.capitalize()}: {good} choices reach 0.9 of the fastest; the minimum is {min(ratios):.2f}."
        )
    lines.append("The choice uses the paces in `codegen.templates`, which are fitted to these same times.")
    harness.write(path.with_suffix(".md"), "\n".join([*lines, "", harness.table(table), ""]))
    print("\n".join(lines))


def _text(stored: dict[str, Any]) -> str:
    """JSON with one row per line."""
    rows = ",\n".join(json.dumps(row) for row in stored["rows"])
    return json.dumps({**stored, "rows": 0}, indent=1).replace('"rows": 0', f'"rows": [\n{rows}\n]') + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=KINDS, help="measure one kind, and keep the times of the others")
    parser.add_argument("--table", metavar="DEVICE", help="measure nothing; use the existing times of a device (h200)")
    options, folder = parser.parse_known_args()[0], harness.arguments().out
    path = folder / f"{options.table or harness.device()}-{NAME}.json"
    empty: dict[str, Any] = {"title": TITLE, "machine": {}, "configs": {}, "rows": []}
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else empty
    if not options.table:
        torch.manual_seed(0)
        folder.mkdir(parents=True, exist_ok=True)
        _work()
        for name in (options.only,) if options.only else KINDS:
            kept = [row for row in stored["rows"] if row["kind"] != name]
            stored["rows"] = kept + [row for shape in shapes(name) for row in measure(name, *shape)]
            stored["configs"][name] = [str(config) for config in all_configs(name)]
            stored["machine"] = harness.machine()
            harness.write(path, _text(stored))
            print(name, file=sys.stderr, flush=True)
    write_table(stored, path)


if __name__ == "__main__":
    main()
