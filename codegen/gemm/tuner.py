"""Measures which configuration runs each GEMM of a model fastest.

Runs only on request, by `compiled.tune(...)`. For each GEMM, the supported configurations whose estimated time is
within `SLACK` of the best estimate take turns, launched from CUDA graphs with weights that do not fit in the L2 cache.
The winner is stored if it beats the estimated choice by more than `NOISE`. Ranks of a sharded model measure together: a
configuration takes as long as on the slowest rank, so that all ranks choose the same one.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from codegen.gemm import tuned
from codegen.launching.timing import in_turns
from codegen.targets.cuda import gpu_at
from codegen.templates.gemm import GEMM, GemmConfig, GemmFamily, GemmOperands, GemmProblem
from codegen.templates.template import ceil_div
from qcompiler.errors import CodegenError
from qcompiler.numerics import ALL

SLACK = 2.0
"""Configurations whose estimate exceeds the best by more than this factor are not measured."""

NOISE = 1.02
"""A winner must be faster than the estimated choice by this factor."""

COLD_BYTES = 160_000_000
"""Total bytes of the weights that take turns, more than an L2 cache holds."""

Progress = Callable[[int, int, "Measured"], None]
"""Called with the number of GEMMs done, their total, and the last result."""


Each = Callable[[Callable[[], str]], Sequence[str]]
"""Takes a step on each rank, and returns the text of each."""


def alone(step: Callable[[], str]) -> list[str]:
    """Takes a step in this process only."""
    return [step()]


@dataclass(frozen=True)
class Measured:
    """The measurements of one GEMM.

    Attributes:
        problem: The GEMM.
        times: Microseconds of each configuration, the fastest first.
        estimated: The configuration that is chosen without a measurement.
    """

    problem: GemmProblem
    times: dict[GemmConfig, float]
    estimated: GemmConfig

    @property
    def best(self) -> GemmConfig:
        """The fastest, or the estimated choice if that is about as fast."""
        fastest = next(iter(self.times))
        return fastest if self.times[fastest] * NOISE < self.times[self.estimated] else self.estimated

    @property
    def ratio(self) -> float:
        """Time of the best over the time of the estimated choice; 1 if they are the same."""
        return self.times[self.best] / self.times[self.estimated]

    def __str__(self) -> str:
        """One line."""
        p, times = self.problem, self.times
        text = f"{p.kind} {p.m} x {p.n} x {p.k}: {times[self.best]:.1f} us, {self.best}"
        if self.best == self.estimated:
            return f"{text}, as estimated"
        return f"{text}; {self.ratio:.2f} of the estimated choice, {times[self.estimated]:.1f} us, {self.estimated}"


@dataclass(frozen=True)
class Tuning:
    """The results of a tuner.

    Attributes:
        gemms: Each GEMM that was measured.
        file: Where the winners are stored; None if there was nothing to measure.
        note: Why nothing, or not everything, was measured.
    """

    gemms: tuple[Measured, ...] = ()
    file: str | None = None
    note: str | None = None

    def __str__(self) -> str:
        """A line for each GEMM."""
        better = sum(each.best != each.estimated for each in self.gemms)
        head = f"{len(self.gemms)} GEMMs measured, {better} with a better configuration than the estimated one"
        last = [text for text in (self.note, self.file and f"stored in {self.file}") if text]
        return "\n".join([head, *map(str, self.gemms), *last])


def tune(
    problems: Iterable[GemmProblem], device: torch.device, progress: Progress | None = None, each: Each = alone
) -> Tuning:
    """Measures GEMMs on an otherwise idle CUDA device, and uses the winners from now on.

    Args:
        problems: The GEMMs; a GEMM with unaligned operands has few choices and is skipped.
        device: The CUDA device.
        progress: Called after each GEMM.
        each: Measures on all ranks that run the same GEMMs, so that they choose the same configurations.

    Raises:
        CodegenError: The ranks measure different GEMMs.
    """
    wanted = [problem for problem in dict.fromkeys(problems) if problem.aligned]
    found: list[Measured] = []

    def measured() -> str:
        for problem in wanted:
            found.append(measure(problem, family))
            if progress is not None:
                progress(len(found), len(wanted), found[-1])
        return times_of(found)

    if not wanted:
        return Tuning(note="there is no GEMM to measure")
    with torch.cuda.device(device), torch.no_grad():
        index = torch.cuda.current_device()
        family = GEMM.family(gpu_at(torch.device("cuda", index)))
        agreed = slowest(found, each(measured))
        file = tuned.learn(index, {one.problem: one.best for one in agreed})
    return Tuning(tuple(agreed), str(file))


def times_of(found: Sequence[Measured]) -> str:
    """The times of measurements as text: for each GEMM, the time of each configuration."""
    return json.dumps(
        [[repr(one.problem), {repr(config): time for config, time in one.times.items()}] for one in found]
    )


def slowest(found: Sequence[Measured], texts: Sequence[str]) -> list[Measured]:
    """Measurements with each configuration's time on the slowest rank, given the times of all ranks.

    Raises:
        CodegenError: The ranks have measured different GEMMs or configurations.
    """
    tables = [json.loads(text) for text in texts]
    if len({repr([[problem, sorted(times)] for problem, times in table]) for table in tables}) > 1:
        fix = "Tune all ranks for the same calls, on GPUs of one model."
        raise CodegenError("the ranks have measured different GEMMs", got=f"{len(texts)} ranks", fix=fix)
    agreed = []
    for at, one in enumerate(found):
        times = {config: max(table[at][1][repr(config)] for table in tables) for config in one.times}
        agreed.append(replace(one, times=dict(sorted(times.items(), key=lambda item: item[1]))))
    return agreed


def candidates(problem: GemmProblem, family: GemmFamily) -> list[GemmConfig]:
    """The configurations that are worth a measurement, the one with the best estimate first."""
    possible = [config for config in family.configs(problem) if family.why_not(config, problem) is None]
    estimates = {config: family.time(config, problem) for config in possible}
    limit = SLACK * min(estimates.values(), default=0.0)
    return sorted((c for c in possible if estimates[c] <= limit), key=lambda config: estimates[config])


def measure(problem: GemmProblem, family: GemmFamily) -> Measured:
    """Times all candidates on the current CUDA device; raises CodegenError if none can run the GEMM."""
    estimated, sets = family.choose(problem), _operands(problem)
    launches = {c: [partial(family.launch, c, each) for each in sets] for c in candidates(problem, family)}
    times = in_turns(launches)
    return Measured(problem, dict(sorted(times.items(), key=lambda item: item[1])), estimated)


def _operands(problem: GemmProblem) -> list[GemmOperands]:
    """Operands of random codes: one activation, and enough weights to exceed the cache."""
    m, n, k, tiles = problem.m, problem.n, problem.k, problem.kind == "tiles"
    width = 1 if problem.x_block == ALL or not tiles else ceil_div(k, problem.x_block)
    xs = torch.rand(width, ceil_div(m, 4) * 4, device="cuda")[:, :m].t().add(0.5)
    if not problem.scale_columns:
        xs = xs.contiguous()
    else:
        xs = torch.empty_strided((m, width), (1, ceil_div(m, 4) * 4), device="cuda").copy_(xs)
    ws = torch.rand(ceil_div(n, 128) if tiles else n, ceil_div(k, 128) if tiles else 1, device="cuda")
    dtype = {2: torch.bfloat16, 4: torch.float32}[problem.out_bytes]
    x, out = _codes(m, k, problem), torch.empty(m, n, dtype=dtype, device="cuda")
    x_block = problem.x_block if tiles else None
    weights = (_codes(n, k, problem) for _ in range(max(1, ceil_div(COLD_BYTES, n * k))))
    return [GemmOperands(x, w, out, xs, ws, x_block=x_block) for w in weights]


def _codes(rows: int, columns: int, problem: GemmProblem) -> Tensor:
    if problem.kind == "rows_i8":
        return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device="cuda")
    return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)
