"""The benchmark of several GPUs runs on a CPU with two processes, and counts bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_two_processes_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "many_gpus.py", "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    links, rows = (
        json.loads((tmp_path / f"smoke-many-gpus{name}-2.json").read_text())["rows"] for name in ("-links", "")
    )
    assert [row["bytes"] for row in links] == [4096, 16384] and min(row["us"] for row in links) > 0
    shapes = [(1, 64), (1, 1), (4, 1)]
    assert [(row["batch"], row["tokens"]) for row in rows] == 2 * shapes
    assert [row["sharding"] for row in rows] == ["tp"] * 3 + ["tp; sp"] * 3
    for row in rows:
        assert min(row[name] for name in ("one GPU ms", "fp8_tile ms", "bf16 ms")) > 0
        # Two sums of 512 bf16 numbers, each of which goes once to the other rank in a sum over two.
        assert row["bf16 sent bytes"] == 2 * 512 * 2 and row["sent bytes"] <= row["bf16 sent bytes"]
    assert [row["sent bytes"] for row in rows[3:]] == [row["sent bytes"] for row in rows[:3]], "so few are not cut"
    assert rows[0]["difference"] < 0.1
