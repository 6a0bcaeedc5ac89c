"""Mutated inputs for all parsers: each input is accepted, or rejected with QCompilerError, within time and memory.

    make fuzz INPUTS=100000                                             all targets, that many inputs each
    python -m pytest tests/fuzz -k pipeline --fuzz-inputs 5000 --fuzz-seed 40    one target, from another seed

The same seeds give the same inputs on every machine. A finding is reported with the smallest input that triggers it.
"""

import ast
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from folder_targets import FOLDER_TARGETS
from hypothesis import HealthCheck, Phase, given, seed, settings
from mutation import mutated
from targets import TEXT_TARGETS, Target

from qcompiler import entry_points
from qcompiler.errors import QCompilerError

TARGETS = {**TEXT_TARGETS, **FOLDER_TARGETS}

SECONDS = 5.0
"""Seconds of CPU time for one input of some kilobytes; a collection of garbage in a long test run can take two."""

MEMORY = 2 << 30
"""Memory that reading may use beyond the process's current size."""

AT_ONCE = 5000
"""Inputs drawn per seed: hypothesis remembers all of them and never draws one twice."""


class TooSlow(BaseException):
    """The time for one input is over; error handlers do not catch it."""


@contextmanager
def limited() -> Iterator[None]:
    """Limits time and memory for one input."""

    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    except TooSlow:
        raise AssertionError(f"it takes more than {SECONDS} seconds") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@pytest.fixture(scope="module")
def inputs(request: pytest.FixtureRequest) -> int:
    """The number of inputs per target."""
    return int(request.config.getoption("--fuzz-inputs"))


@pytest.fixture(scope="module")
def first(request: pytest.FixtureRequest) -> int:
    """The first seed."""
    return int(request.config.getoption("--fuzz-seed"))


@pytest.fixture(scope="module", autouse=True)
def _little_memory() -> Iterator[None]:
    """Makes huge allocations raise MemoryError instead of exhausting the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module", autouse=True)
def _installed_once() -> Iterator[None]:
    """Caches the installed entry points: looking them up for each unknown name would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry_points, "entry_points", cache(metadata.entry_points))
        yield


def outcome(target: Target, data: bytes) -> str:
    """The outcome of reading: `taken`, or the name of the rejecting error; other exceptions propagate."""
    with limited():
        try:
            target.read(data)
        except QCompilerError as error:
            str(error)
            return type(error).__name__
    return "taken"


def fuzz(target: Target, inputs: int, first: int) -> Counter[str]:
    """Counts outcomes over inputs; raises an exception with the smallest input of each finding."""
    seen = Counter[str]()
    while (left := inputs - seen.total()) > 0:

        @seed(first)
        @settings(
            max_examples=min(left, AT_ONCE),
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            derandomize=False,
        )
        @given(mutated(target.seeds, target.words))
        def read(data: bytes) -> None:
            try:
                seen[outcome(target, data)] += 1
            except BaseException as error:
                error.add_note(f"the input: {data!r}")
                raise

        read()
        first += 1
    return seen


@pytest.mark.parametrize("name", TARGETS)
def test_every_mutated_input_is_taken_or_refused(
    name: str, inputs: int, first: int, record_property: Callable[[str, object], None]
) -> None:
    start = time.perf_counter()
    seen = fuzz(TARGETS[name], inputs, first)
    took = f"{name}: {seen.total()} inputs in {time.perf_counter() - start:.1f} s"
    record_property("fuzzed", f"{took}: {', '.join(f'{count} {what}' for what, count in seen.most_common())}")


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_accepted_unmutated(name: str) -> None:
    for data in TARGETS[name].seeds:
        assert outcome(TARGETS[name], data) == "taken"


def test_a_finding_comes_with_its_smallest_input() -> None:
    def reads(data: bytes) -> None:
        if b"canonicalize" not in data:
            raise KeyError("canonicalize")

    with pytest.raises(KeyError) as caught:
        fuzz(Target(reads, (b"canonicalize; fp8-tile",)), 200, 0)
    (note,) = [note for note in caught.value.__notes__ if note.startswith("the input: ")]
    assert b"canonicalize" not in ast.literal_eval(note.removeprefix("the input: "))
    again = fuzz(Target(lambda _: None, (b"x",)), 50, 0)
    assert again == {"taken": 50}


def test_endless_loops_and_huge_allocations_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 0.05)

    def never_ends(_: bytes) -> None:
        while True:
            pass

    with pytest.raises(AssertionError, match=r"it takes more than 0\.05 seconds"):
        outcome(Target(never_ends, ()), b"")
    with pytest.raises(MemoryError):
        outcome(Target(lambda _: bytearray(2 * MEMORY), ()), b"")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("atheris") is None, reason="needs atheris: pip install -e '.[fuzz]'")
def test_guided_fuzzing_uses_the_same_targets(root: Path) -> None:
    command = [sys.executable, str(root / "tests/fuzz/guided.py"), "size", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "DONE" in done.stderr, done.stderr
