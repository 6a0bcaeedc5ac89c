"""Every kernel under compute-sanitizer: bad addresses, races in shared memory, misused barriers.

    PYTHONPATH=. python benchmarks/sanitize.py [--out FOLDER] [--seconds 190] [--only REGULAR_EXPRESSION]
    PYTHONPATH=. python benchmarks/sanitize.py --rehearse            # without a GPU: everything but the kernels

Runs small launches of every configuration that can be chosen, at sizes that no tile divides, and checks each result
against the reference on the CPU: see `sanitizing/families.py`. Each tool runs each family in its own process, a few at
a time. torch's caching allocator is off there, so memcheck sees the end of every tensor. What has not started when the
time is over is listed as not run.

racecheck reports two kinds of pairs although something that it does not see orders them (`sanitizing/orders.py`):
Triton's dispatch to specialized warps, and numbers that a warpgroup passes to another one through an mbarrier. The
benchmark recognizes such pairs by their instructions and counts them separately.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import harness
import torch

from benchmarks.sanitizing.families import FAMILIES
from benchmarks.sanitizing.orders import Code, Race, code_of, is_dispatch, is_handed_over, races_of
from benchmarks.sanitizing.place import OnGpu, Rehearsal
from codegen.kernel_cache import use_cache_folder
from codegen.machine_code import disassembly

TOOLS = ("memcheck", "racecheck", "synccheck")

SECONDS, AT_ONCE = 60, 12
"""Time limit of one process, and the number of processes at a time."""

CHILD, FOUND = "--child", re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


def child(family: str) -> None:
    """Launches one family, checks each result, and prints the number of launches."""
    torch.manual_seed(0)
    done = ["none"]
    try:
        for what in FAMILIES[family](OnGpu()):
            torch.cuda.synchronize()
            done.append(what)
    except Exception as error:
        print(f"Error after {done[-1]!r}: {error}", flush=True)
        raise
    print(f"LAUNCHED {len(done) - 1}", flush=True)


def rehearse() -> None:
    """Runs all families up to the launches, on the CPU."""
    torch.manual_seed(0)
    for family, run in FAMILIES.items():
        place = Rehearsal()
        print(f"{family}: {len(list(run(place)))} launches, {len(place.calls)} kernel calls", flush=True)


def check(tool: str, family: str, until: float) -> dict[str, Any]:
    """One row: a tool's result for a family; without a tool, whether the family runs at all."""
    command = [sys.executable, __file__, CHILD, family]
    if tool:
        command = [_sanitizer(), "--tool", tool, "--target-processes", "all", "--print-limit", "100", *command]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    limit = min(SECONDS, until - start)
    try:
        if limit <= 0:
            raise subprocess.TimeoutExpired(command, 0)
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False, env=environment)
        said = done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode(errors="replace") + "\nnot run, or stopped at the time limit"
    launched, found = re.search(r"LAUNCHED (\d+)", said), FOUND.search(said)
    races = races_of(said) if tool == "racecheck" else []
    dispatch = [race for race in races if _is(is_dispatch, race)]
    handed = [race for race in races if race not in dispatch and _is(is_handed_over, race)]
    rest = [race.text for race in races if race not in dispatch and race not in handed]
    reports = int(found[1]) - len(dispatch) - len(handed) if found else None
    clean = launched and (not tool or reports == 0)
    row = {
        "tool": tool or "none", "family": family, "launches": launched and int(launched[1]), "reports": reports,
        "of warp_specialize": len(dispatch) if tool == "racecheck" else None,
        "of mbarriers": len(handed) if tool == "racecheck" else None, "seconds": time.perf_counter() - start,
        "first words": "" if clean else rest[0] if rest else _first_words(said),
    }  # fmt: skip
    print(*row.values(), *rest, flush=True)
    return row


def _is(kind: Callable[[Race, Code], bool], race: Race) -> bool:
    """Whether a pair is of this kind, in one of the compiled kernels with its name."""
    return any(kind(race, _code(path)) for path in Path(use_cache_folder()).rglob(f"{race.kernel}.cubin"))


@cache
def _code(cubin: Path) -> Code:
    return code_of(disassembly(cubin))


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
    parser = argparse.ArgumentParser()
    parser.add_argument(CHILD, metavar="FAMILY", choices=FAMILIES, help="launch one family")
    parser.add_argument("--rehearse", action="store_true", help="run everything but the kernels, without a GPU")
    parser.add_argument("--seconds", type=float, default=190, help="time limit; processes are stopped then")
    parser.add_argument("--only", default="", help="families whose names match this")
    options = parser.parse_known_args()[0]
    if options.rehearse:
        return rehearse()
    if options.child:
        return child(options.child)
    until = time.perf_counter() + options.seconds
    families = [family for family in FAMILIES if re.search(options.only, family)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = list(pool.map(partial(check, "", until=until), families))  # without a tool, to compile the kernels
        runnable = [row["family"] for row in rows if row["launches"]]
        rows += pool.map(lambda job: check(*job, until), [(tool, family) for tool in TOOLS for family in runnable])
    version = subprocess.run([_sanitizer(), "--version"], capture_output=True, text=True, check=False).stdout
    facts = harness.machine() | {"compute-sanitizer": version.strip().splitlines()[-1] if version else "?"}
    harness.report(f"{harness.device()}-sanitizer", "Every family of kernels under compute-sanitizer", rows, facts)


if __name__ == "__main__":
    main()
