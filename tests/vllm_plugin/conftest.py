"""What vLLM's layers need: a configuration and a group of one process."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def group(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A group of one process, which vLLM accepts once."""
    settings: Any = pytest.importorskip("vllm.config")
    distributed: Any = pytest.importorskip("vllm.distributed")
    with settings.set_current_vllm_config(settings.VllmConfig()):
        file = tmp_path_factory.mktemp("group") / "file"
        distributed.init_distributed_environment(1, 0, f"file://{file}", 0, "gloo")
        distributed.initialize_model_parallel(1)


@pytest.fixture(scope="module")
def engine(group: None) -> Iterator[None]:
    """A configuration, until the tests of a module end."""
    settings: Any = pytest.importorskip("vllm.config")
    with settings.set_current_vllm_config(settings.VllmConfig()):
        yield
