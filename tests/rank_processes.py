"""Runs a script as two ranks on gloo: `mesh` and `rank` are set, and `found` is what the script returns."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

START = """
import sys
from pathlib import Path
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
import qcompiler

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
sys.path.append(sys.argv[3])
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
found = {}


def error_of(step):
    try:
        step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
"""
END = """
torch.save(found, folder / f"{rank}.pt")
distributed.destroy_process_group()
"""


def run_on_two_ranks(script: str, folder: Path, seconds: float = 90) -> list[dict[str, Any]]:
    """Runs a script on each rank; returns what each put into `found`.

    Args:
        script: Python, with `rank`, `mesh`, `folder`, `found`, and `error_of(step)`.
        folder: For the results, and as `folder` for the script.
        seconds: The time limit; a rank that hangs fails the test.
    """
    command, rest = [sys.executable, "-c", START + script + END], [str(folder), str(Path(__file__).parent)]
    ranks = [subprocess.Popen([*command, str(rank), *rest], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        errors = [rank.communicate(timeout=seconds)[1] for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
