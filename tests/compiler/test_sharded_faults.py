"""Faults of ranks: each of them ends with one sentence, in bounded time."""

from pathlib import Path
from typing import Any

import torch
from rank_processes import run_on_two_ranks

FAILING = """
import time
from sharded_graphs import MLP, MLP_INPUT as X, mlp

def timed(step):
    start = time.monotonic()
    return error_of(step), time.monotonic() - start

odd = qcompiler.Graph.parse(MLP.replace("256", "255"))
odd.weights.update(w1=torch.randn(255, 64), w2=torch.randn(64, 255))
found["odd"] = error_of(lambda: qcompiler.compile(odd, mesh=mesh))

def compile_on_rank_0(model=mlp(), **options):
    return qcompiler.compile(model if rank == 0 else qcompiler.Graph.parse(MLP), mesh=mesh, **options)

found["weights"] = error_of(compile_on_rank_0)
found["scheme"] = error_of(lambda: qcompiler.compile(mlp(), scheme=["fp8_tile", "fp8_row"][rank], mesh=mesh))
found["folder"] = error_of(lambda: qcompiler.compile([mlp(), folder / "nothing"][rank], mesh=mesh))
found["decoder"] = error_of(lambda: qcompiler.decoder(folder / ["nothing", "none"][rank], mesh=mesh))

compiled = qcompiler.compile(mlp(), mesh=mesh)
found["works"] = compiled(X)
"""

ENDING = (
    FAILING
    + """
if rank == 1:
    torch.save(found, folder / "1.pt")
    import os
    os._exit(0)
found["ended"] = timed(lambda: compiled(X))
torch.save(found, folder / "0.pt")
import os
os._exit(0)
"""
)

SLOW = """
import os, time
os.environ["QCOMPILER_COLLECTIVE_SECONDS"] = "1"
from sharded_graphs import MLP_INPUT as X, mlp

compiled = qcompiler.compile(mlp(), mesh=mesh)
start = time.monotonic()
if rank == 1:
    while not (folder / "0.pt").exists() and time.monotonic() < start + 30:
        time.sleep(0.05)
else:
    found["error"] = error_of(lambda: compiled(X))
found["seconds"] = time.monotonic() - start
torch.save(found, folder / f"{rank}.pt")
os._exit(0)
"""


def starts(found: dict[str, Any], key: str, text: str) -> bool:
    return str(found[key]).startswith(text)


def test_a_rank_that_fails_or_ends(tmp_path: Path) -> None:
    one, two = run_on_two_ranks(ENDING, tmp_path)
    for found in (one, two):
        assert starts(found, "odd", "PassError: nothing can be sharded: got the mesh tp=2")
    assert starts(one, "weights", "QCompilerError: rank 1 has failed: the graph reads weights that it does not have")
    assert starts(two, "weights", "CaptureError: the graph reads weights that it does not have")
    assert starts(one, "scheme", "QCompilerError: rank 1 has failed: nothing can be sharded")
    assert starts(two, "scheme", "PassError: nothing can be sharded")
    assert starts(one, "folder", "QCompilerError: rank 1 has failed: there is no such folder")
    assert starts(two, "folder", "QCompilerError: there is no such folder")
    assert starts(one, "decoder", "QCompilerError: there is no such folder")
    assert torch.equal(one["works"], two["works"])
    error, seconds = one["ended"]
    assert error.startswith("QCompilerError: a collective has failed: another rank has ended or has not arrived")
    assert seconds < 30


def test_a_rank_that_does_not_arrive(tmp_path: Path) -> None:
    one, two = run_on_two_ranks(SLOW, tmp_path)
    assert one["error"].startswith("QCompilerError: a collective has failed: another rank has ended or has not arr")
    assert "QCOMPILER_COLLECTIVE_SECONDS sets how long ranks wait" in one["error"]
    assert one["seconds"] < 10
    assert "error" not in two
