"""Every kernel family under compute-sanitizer: bad addresses, races in shared memory, misused barriers.

    python benchmarks/sanitize.py [--out FOLDER]

Runs small launches of every configuration that can be chosen, at sizes that no tile divides, and checks each result
against the reference on the CPU. Each tool runs each family in its own process, a few at a time. torch's caching
allocator is off there, so memcheck sees the end of every tensor.

racecheck reports one kind of access that is not in our code and is not a race: Triton tells the warps of
`gl.warp_specialize` what to run through bytes in shared memory. The first warps write them (STS), all warps meet at
named barrier 1, and each other warp reads its own (LDS.U8); racecheck does not see that barrier. The benchmark
recognizes such pairs by their instructions and counts them separately.
"""

import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

import codegen.torch_ops  # noqa: F401  (registers the operators)
from codegen.kernel_cache import use_cache_folder
from codegen.machine_code import disassembly
from codegen.targets.hopper import HOPPER
from codegen.templates.fused import FUSED_GEMM, FusedGemmProblem, FusedOperands, Separate
from codegen.templates.gemm import GEMM, GemmOperands, GemmProblem, Kind
from qcompiler import numerics

TOOLS = ("memcheck", "racecheck", "synccheck")
TOLERANCE = 4e-3
"""Tolerances for relative errors: one rounding to bf16, and FP8 sums in a different order."""

SECONDS, AT_ONCE = 60, 12
"""Time limit of one process, and the number of processes at a time."""

CHILD, FOUND = "--child", re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
RACE = re.compile(
    r"Race reported between (\w+) access at (\w+)\+(0x[0-9a-f]+)(.*?)\n.*?and (\w+) access at \w+\+(0x[0-9a-f]+)(.*)"
)
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", re.MULTILINE)
E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
TILE, BLOCK, TOKEN = [1, 128], [128, 128], [1, -1]
M, N, K = 130, 272, 400

ops = torch.ops.qcompiler


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Rows of different sizes, made on the CPU so that none of torch's kernels runs."""
    generator = torch.Generator().manual_seed(seed + shape[0])
    return torch.randn(shape, generator=generator).mul(torch.rand(*shape[:-1], 1, generator=generator) + 0.1).to(BF16)


def close(got: Tensor, want: Tensor) -> None:
    """Raises RuntimeError if a kernel and the reference differ by more than rounding."""
    got, want = got.cpu().double(), want.cpu().double()
    error = float((got - want).norm() / want.norm())
    if not error <= TOLERANCE:
        raise RuntimeError(f"relative error {error:.2e}")


def quantized(rows: int, columns: int, block: list[int], dtype: torch.dtype = E4M3, layout: str = "row_major") -> Any:
    """Codes and scales from our kernel."""
    return ops.quantize(draw(rows, columns).cuda(), block, dtype, "deepseek", layout)


# Each family yields the name of each launch after checking it.


def quantizations() -> Iterator[str]:
    for shape in ((M, K), (3, 5, 1000)):
        x = draw(*shape)
        for block, layout in ((TILE, "row_major"), (TILE, "col_major"), ([1, 32], "col_major"), (TOKEN, "row_major"),
                              ([-1, -1], "row_major"), (BLOCK, "row_major")):  # fmt: skip
            for dtype in (E4M3, torch.int8):
                for prescale in (None, draw(1, shape[-1])[0].float()):
                    options = (block, dtype, "deepseek", layout)
                    got = ops.quantize(x.cuda(), *options, None if prescale is None else prescale.cuda())
                    want = ops.quantize(x, *options, prescale)
                    close(got[0].float(), want[0].float())
                    close(got[1], want[1])
                    yield f"quantize {block} {dtype}"
        scale = torch.tensor([[0.02]])
        got = ops.quantize_static(x.cuda(), scale.cuda(), [-1, -1], E4M3, "deepseek")
        close(got.float(), ops.quantize_static(x, scale, [-1, -1], E4M3, "deepseek").float())
        yield "quantize_static"


def products() -> Iterator[str]:
    for x_block in (128, 64, 32, -1):
        x, xs = quantized(M, K, [1, x_block], layout="col_major")
        w, ws = quantized(N, K, BLOCK)
        bias = draw(N, 1)[:, 0].contiguous().cuda()
        parts = [t.cpu() for t in (x, xs, w, ws, bias)]
        want = numerics.scaled_linear(*parts, x_format=numerics.format_of((1, x_block)), out_dtype=BF16)
        problem = GemmProblem(M, N, K, x_block=x_block)
        for config in GEMM.family(HOPPER).configs(problem):
            if GEMM.family(HOPPER).why_not(config, problem) is None:
                out = torch.full((M, N), math.nan, dtype=BF16).cuda()
                GEMM.family(HOPPER).launch(config, GemmOperands(x, w, out, xs, ws, bias, x_block))
                close(out, want)
                yield f"x_block {x_block}: {config}"


def split_products() -> Iterator[str]:
    for m in (1, 17, 64):
        x, xs = quantized(m, 2064, TILE, layout="col_major")
        w, ws = quantized(N, 2064, BLOCK)
        options: Any = (None, TILE, BLOCK, BF16)
        close(
            ops.scaled_linear(x, xs, w, ws, *options), ops.scaled_linear(*(t.cpu() for t in (x, xs, w, ws)), *options)
        )
        yield f"split K, {m} rows"


def row_products() -> Iterator[str]:
    kinds: tuple[tuple[Kind, torch.dtype], ...] = (("rows_f8", E4M3), ("rows_i8", torch.int8))
    for kind, dtype in kinds:
        x, xs = quantized(M, K, TOKEN, dtype)
        w, ws = quantized(N, K, TOKEN, dtype)
        rows = numerics.format_of((1, -1), dtype)
        parts = [t.cpu() for t in (x, xs, w, ws)]
        want = numerics.scaled_linear(*parts, x_format=rows, w_format=rows, out_dtype=BF16)
        problem = GemmProblem(M, N, K, kind=kind)
        for config in GEMM.family(HOPPER).configs(problem):
            if GEMM.family(HOPPER).why_not(config, problem) is None:
                out = torch.full((M, N), math.nan, dtype=BF16).cuda()
                GEMM.family(HOPPER).launch(config, GemmOperands(x, w, out, xs, ws, x_block=None))
                close(out, want)
                yield f"{kind}: {config}"


def fused_quantizations() -> Iterator[str]:
    norm = "h = bf16(x0 + x1); n = bf16(h * rsqrt(mean(h * h) + 1e-06)); bf16(x2 * n)"
    for m, k in ((M, 400), (3, 1000)):
        x, r, gain = draw(m, k), draw(m, k, seed=1), draw(1, k)[0]
        for expression, keep, operands in ((norm, ["h"], (x, r, gain)), ("bf16(silu(x0) * x1)", [], (x, r))):
            for block in (TILE, TOKEN):
                options: Any = (
                    expression,
                    keep,
                    block,
                    E4M3,
                    "deepseek",
                    "col_major" if block == TILE else "row_major",
                )
                got = ops.fused_quantize([t.cuda() for t in operands], *options)
                want = ops.fused_quantize(list(operands), *options)
                close(got[1], want[1])
                close(got[0].float(), want[0].float())
                yield f"{expression} {block}"


def fused_products() -> Iterator[str]:
    """The operator, which may use two kernels for such small problems, and each form of the single kernel."""
    one, two = "bf16(x0 + bf16(y0))", "bf16(bf16(silu(bf16(y0))) * bf16(y1))"
    for m in (M, 16):
        x, xs = quantized(m, K, TILE, layout="col_major")
        w, ws = quantized(512, K, BLOCK)
        for expression, parts in ((one, 1), (two, 2)):
            others = [draw(m, 512).cuda()] if parts == 1 else []
            operands = (x, xs, w, ws)
            for quantize in ((), (TILE, E4M3, "deepseek", "row_major")):
                options: Any = (expression, parts, TILE, BLOCK, *quantize)
                want = ops.fused_linear(*(t.cpu() for t in operands), None, [t.cpu() for t in others], *options)
                close(ops.fused_linear(*operands, None, others, *options)[-1].float(), want[-1].float())
                yield f"{expression}, quantized: {bool(quantize)}"
                for config in FUSED_GEMM.family(HOPPER).configs(FusedGemmProblem(M, N, K, parts)):
                    if isinstance(config, Separate) or config.parts != parts:
                        continue
                    out, *scale = (torch.empty_like(t, device="cuda") for t in want)
                    product = GemmOperands(x, w, out, xs, ws)
                    FUSED_GEMM.family(HOPPER).launch(config, FusedOperands(expression, product, others, *scale))
                    close((scale or [out])[0].float(), want[-1].float())
                    yield f"{config}: {expression}, quantized: {bool(quantize)}"


def grouped_products() -> Iterator[str]:
    counts = torch.tensor([0, 70, 1, 59])
    offsets, experts = counts.cumsum(0).to(torch.int32), len(counts)
    x, xs = quantized(M, K, TILE, layout="col_major")
    each = [quantized(N, K, BLOCK) for _ in range(experts)]
    w, ws = torch.stack([codes.view(torch.uint8) for codes, _ in each]).view(E4M3), torch.stack([s for _, s in each])
    options: Any = (TILE, BLOCK, BF16)
    want = ops.grouped_linear(*(t.cpu() for t in (x, xs, w, ws, offsets)), *options)
    close(ops.grouped_linear(x, xs, w, ws, offsets.cuda(), *options), want)
    yield "contiguous groups"
    rows, scales = zip(*(quantized(70, K, TILE) for _ in range(experts)), strict=True)
    x, xs = torch.stack([codes.view(torch.uint8) for codes in rows]).view(E4M3), torch.stack(scales)
    got, want = (
        ops.grouped_linear_masked(*(t.to(device) for t in (x, xs, w, ws, counts.to(torch.int32))), *options).cpu()
        for device in ("cuda", "cpu")
    )
    for index, count in enumerate(counts.tolist()):
        if count:
            close(got[index, :count], want[index, :count])
    yield "masked groups"


FAMILIES: dict[str, Callable[[], Iterator[str]]] = {
    "quantize": quantizations, "products": products, "split K": split_products, "rows and columns": row_products,
    "fused quantize": fused_quantizations, "fused product": fused_products, "grouped product": grouped_products,
}  # fmt: skip


def child(family: str) -> None:
    """Launches one family, checks each result, and returns the number of launches."""
    count = 0
    for _ in FAMILIES[family]():
        torch.cuda.synchronize()
        count += 1
    print(f"LAUNCHED {count}", flush=True)


def check(tool: str, family: str) -> dict[str, Any]:
    """One row: a tool's result for a family; without a tool, whether the family runs at all."""
    command = [sys.executable, __file__, CHILD, family]
    if tool:
        command = [_sanitizer(), "--tool", tool, "--target-processes", "all", "--print-limit", "100", *command]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, env=environment)
        said = done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode(errors="replace") + "\nstopped at the time limit"
    launched, found = re.search(r"LAUNCHED (\d+)", said), FOUND.search(said)
    races = [match.groups() for match in RACE.finditer(said)] if tool == "racecheck" else []
    rest = [race for race in races if not _is_dispatch(race)]
    dispatch = len(races) - len(rest)
    reports = int(found[1]) - dispatch if found else None
    clean = launched and (not tool or reports == 0)
    row = {
        "tool": tool or "none", "family": family, "launches": launched and int(launched[1]), "reports": reports,
        "of warp_specialize": dispatch if tool == "racecheck" else None, "seconds": time.perf_counter() - start,
        "first words": "" if clean else " ".join(rest[0]) if rest else _first_words(said),
    }  # fmt: skip
    print(*row.values(), *rest, flush=True)
    return row


def _is_dispatch(race: tuple[str, ...]) -> bool:
    """Whether a pair of accesses is Triton's dispatch to specialized warps."""
    first, kernel, at, _, second, other, _ = race
    places = {first: at, second: other}
    if places.keys() != {"Read", "Write"}:
        return False
    codes = (_instructions(path) for path in Path(use_cache_folder()).rglob(f"{kernel}.cubin"))
    return any(
        code.get(int(places["Read"], 16)) == "LDS.U8" and code.get(int(places["Write"], 16)) in ("STS.64", "STS")
        for code in codes
    )


@cache
def _instructions(cubin: Path) -> dict[int, str]:
    """Address -> instruction."""
    sass = disassembly(cubin)
    return {int(address, 16): name for address, name in INSTRUCTION.findall(sass)}


def _sanitizer() -> str:
    here = [shutil.which("compute-sanitizer"), *map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))]
    if not any(here):
        raise SystemExit("compute-sanitizer is not on this machine: it comes with the CUDA toolkit")
    return next(path for path in here if path)


def _first_words(said: str) -> str:
    """The first finding of a tool, or how the program ended."""
    lines = [line.removeprefix("=========").strip() for line in said.splitlines() if line.strip("= ")]
    telling = [line for line in lines if re.search(r"Invalid|Error|Barrier|Race|hazard|not supported|divergent", line)]
    return " / ".join((telling or lines[-2:])[:2])[:220].replace("|", " ")


def main() -> None:
    if CHILD in sys.argv:
        return child(sys.argv[sys.argv.index(CHILD) + 1])
    jobs = [("", family) for family in FAMILIES]  # first without a tool, to compile the kernels
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = list(pool.map(lambda job: check(*job), jobs))
        runnable = [row["family"] for row in rows if row["launches"]]
        rows += pool.map(lambda job: check(*job), [(tool, family) for tool in TOOLS for family in runnable])
    version = subprocess.run([_sanitizer(), "--version"], capture_output=True, text=True, check=False).stdout
    facts = harness.machine() | {"compute-sanitizer": version.strip().splitlines()[-1] if version else "?"}
    harness.report(f"{harness.device()}-sanitizer", "Every family of kernels under compute-sanitizer", rows, facts)


if __name__ == "__main__":
    main()
