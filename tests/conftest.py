"""Shared by all tests: markers, hypothesis profiles, and an environment isolated from network and caller."""

import gc
import os
import sys

# Set before the first import of torch: each xdist worker gets its share of the cores, and model hubs stay offline.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Saves time only for models with many equal layers; ours have two, and torch.export takes a third longer with it.
os.environ["TORCH_FAKE_TENSOR_DISPATCH_CACHE"] = "0"
# Workers and child processes share compiled modules: compiling all of ours takes each of them 0.4 s.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    sys.dont_write_bytecode = False

from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import kept_files
import pytest
from hypothesis import settings
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

# Graphs of models are many objects that live long; with the default of 700, a trace causes thousands of collections.
gc.set_threshold(20_000, 20, 100)

ROOT = Path(__file__).parents[1]

_frozen = 0  # modules at the last gc.freeze


@cache
def no_hopper() -> str | None:
    """Why `gpu` tests cannot run here, or None if they can."""
    import torch

    if not torch.cuda.is_available():
        return "needs a Hopper GPU: torch finds no CUDA device"
    if (capability := torch.cuda.get_device_capability()) != (9, 0):
        return f"needs a Hopper GPU: {torch.cuda.get_device_name()} has compute capability {capability}, not (9, 0)"
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options that set the amount of fuzzing."""
    parser.addoption("--fuzz-inputs", type=int, default=500, help="mutated inputs for each target of tests/fuzz")
    parser.addoption("--fuzz-seed", type=int, default=0, help="the first seed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a machine without a Hopper GPU, leaves one `gpu` test of each file, which skips with the reason."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked or not (reason := no_hopper()):
        return
    counts = Counter(item.path for item in marked)
    first = {item.path: item for item in reversed(marked)}
    for path, item in first.items():
        item.add_marker(pytest.mark.skip(reason=f"{reason} ({counts[path]} tests)"))
    dropped = {item for item in marked if item is not first[item.path]}
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=[item for item in marked if item in dropped])


@pytest.fixture(scope="module", autouse=True)
def _modules_are_not_garbage() -> None:
    """Hides imported modules from the garbage collector, which otherwise takes a quarter of the time of compilation.

    A full collection visits all objects, and most of them are the code of torch, transformers and sympy.
    """
    global _frozen
    if len(sys.modules) > _frozen + 50:
        gc.collect()
        gc.freeze()
        _frozen = len(sys.modules)


@pytest.fixture(scope="module", autouse=True)
def _shared_traces(request: pytest.FixtureRequest) -> Iterator[None]:
    """Shares traces of whole models, except between the tests of capture itself."""
    capturing = sys.modules.get("qcompiler.capture.capturing")
    if capturing is None or "capture" in request.path.parts:
        yield
        return
    import shared_traces

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capturing, "export_program", shared_traces.shared(capturing.export_program))
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints measurements from tests at the end of the run, from all workers."""
    reports = (report for group in terminalreporter.stats.values() for report in group)
    properties = [pair for report in reports for pair in getattr(report, "user_properties", ())]
    if budgets := {tuple(value) for key, value in properties if key == "budget"}:  # from each phase of a test
        _write_budgets(terminalreporter, budgets)
    if fuzzed := sorted({str(value) for key, value in properties if key == "fuzzed"}):
        terminalreporter.section("mutated inputs")
        for line in fuzzed:
            terminalreporter.write_line(line)


def _write_budgets(terminalreporter: pytest.TerminalReporter, lines: set[tuple[str, ...]]) -> None:
    """The table of kernel resources."""
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("kernel", no_wrap=True)
    for heading in ("registers", "warps", "shared memory", "blocks", "tensor core", "copy engine", "spills"):
        table.add_column(heading, justify="right")
    for name, *numbers in sorted(lines):
        table.add_row(name, *map(str, numbers))
    console = Console(width=160, no_color=True, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(table)
    terminalreporter.section("resources of each kernel on a multiprocessor")
    for line in capture.get().splitlines():
        terminalreporter.write_line(line.rstrip())


@pytest.fixture(scope="session")
def root() -> Path:
    """The root folder of the repository."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def _own_knobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hides the caller's knobs except QCOMPILER_UPDATE, and gives each test a separate cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("QCOMPILER_") and name != "QCOMPILER_UPDATE"]:
            patch.delenv(name)
        # All workers of a run share it, so each kernel is compiled once.
        base = tmp_path_factory.getbasetemp()
        folder = base.parent / "cache" if "PYTEST_XDIST_WORKER" in os.environ else tmp_path_factory.mktemp("cache")
        folder.mkdir(exist_ok=True)
        patch.setenv("QCOMPILER_CACHE_DIR", str(folder))
        _keep_compiled_files(patch)
        yield


def _keep_compiled_files(patch: pytest.MonkeyPatch) -> None:
    """Looks up kernels and IREE modules on disk; only if a test file loaded their compilers, which takes seconds."""
    if machine_code := sys.modules.get("codegen.machine_code"):
        import machine_code_cache

        patch.setattr(machine_code, "compile_source", machine_code_cache.kept(machine_code.compile_source))
        kept_files.delete_old(machine_code_cache.FOLDER)
    if building := sys.modules.get("codegen.mlir.iree.building"):
        import iree_cache

        patch.setattr(building, "compile_module", iree_cache.kept(building.compile_module))
        kept_files.delete_old(iree_cache.FOLDER)
