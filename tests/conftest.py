"""What all tests share: markers, hypothesis profiles, and an environment without network or leftovers."""

import os

# Before torch is first imported: each xdist worker has its share of the cores, and nothing reaches for a model hub.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

ROOT = Path(__file__).parents[1]


@cache
def no_hopper() -> str | None:
    """Why `gpu` tests cannot run here, or None where they can."""
    import torch

    if not torch.cuda.is_available():
        return "needs a Hopper GPU: torch finds no CUDA device"
    if (capability := torch.cuda.get_device_capability()) != (9, 0):
        return f"needs a Hopper GPU: {torch.cuda.get_device_name()} has compute capability {capability}, not (9, 0)"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips, with the reason, what is marked `gpu` on a machine without a Hopper GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := no_hopper()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def root() -> Path:
    """The top folder of the tree."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def _own_knobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests see none of the caller's knobs but QCOMPILER_UPDATE, and write to a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("QCOMPILER_") and name != "QCOMPILER_UPDATE"]:
            patch.delenv(name)
        patch.setenv("QCOMPILER_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
