"""Measures on trained weights which granularities survive activation outliers.

    make study                                        or: python examples/granularity_study.py
    python examples/granularity_study.py --only lm    one part: minilm, lm or sweep

Writes the CSV files and figures in docs/granularity/, and fills the tables of docs/granularity.md from them. Everything
runs in f32 on the CPU with the reference of each quantized operation. Results are reproducible on the same machine.
"""

import argparse
import csv
import io
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import study_measures as measures
import study_plots as plots
import study_tables as tables
import torch
from study_subjects import QUICK, LanguageModel, SentenceModel, Settings, language_model, sentence_model

import qcompiler
from qcompiler.files.replacing import replacing_file

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "granularity"
PAGE = OUTPUT.with_suffix(".md")
PARTS = ("minilm", "lm", "sweep")


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part of the study (default: all parts)")
    parser.add_argument("--quick", action="store_true", help="little data and few schemes, as a smoke test")
    parser.add_argument("--plots", action="store_true", help="measure nothing; use the existing CSV files")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER")
    options = parser.parse_args()

    started = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    parts = (options.only,) if options.only else PARTS
    if not options.plots:
        measure(parts, options.quick, options.output)
    for path in plots.draw(parts, options.output):
        print(path)
    if options.output.resolve() == OUTPUT:
        write(PAGE, tables.filled(PAGE.read_text(encoding="utf-8"), OUTPUT))
        print(PAGE)
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes")


def measure(parts: Sequence[str], quick: bool, folder: Path) -> None:
    """Runs some parts of the study and writes their CSV files."""
    settings = QUICK if quick else Settings()
    schemes = measures.QUICK_SCHEMES if quick else measures.all_schemes()
    write(folder / "settings.json", json.dumps(versions() | asdict(settings), indent=2) + "\n")
    sentences = sentence_model(settings) if {"minilm", "sweep"} & {*parts} else None
    language = language_model(settings) if {"lm", "sweep"} & {*parts} else None
    if sentences and "minilm" in parts:
        save(folder / "minilm.csv", measures.sentence_rows(sentences, schemes, "sentence embeddings"))
        extra = measures.QUICK_OPTIONS if quick else measures.SENTENCE_OPTIONS
        save(folder / "minilm_options.csv", measures.sentence_rows(sentences, extra, "sentence embeddings, options"))
    if language and "lm" in parts:
        save(folder / "lm_float.csv", measures.float_rows(language))
        save(folder / "lm.csv", measures.language_rows(language, schemes, settings.factors, "language model"))
        extra = measures.QUICK_OPTIONS if quick else measures.OPTIONS
        ends = (settings.factors[0], settings.factors[-1])
        save(folder / "lm_options.csv", measures.language_rows(language, extra, ends, "language model, options"))
    if sentences and language and "sweep" in parts:
        sweep(sentences, language, quick, folder)


def sweep(sentences: SentenceModel, language: LanguageModel, quick: bool, folder: Path) -> None:
    """Writes the CSV file for the tile widths."""
    sizes = measures.QUICK_K_BLOCKS if quick else measures.K_BLOCKS
    factors = language.settings.factors
    save(folder / "k_block.csv", measures.sweep_rows(sentences, language, sizes, (factors[0], factors[-1])))


def versions() -> dict[str, Any]:
    """The versions and settings of the measurement."""
    return {
        "python": platform.python_version(), "torch": torch.__version__, "qcompiler": qcompiler.__version__,
        "machine": platform.machine(), "threads": torch.get_num_threads(), "evaluation": "f32, CPU",
    }  # fmt: skip


def save(path: Path, rows: Sequence[measures.Row]) -> None:
    """Rows as a CSV file, numbers with seven significant digits."""
    measures.check_finite(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.7g}" if isinstance(value, float) else value for key, value in row.items()})
    write(path, text.getvalue())


def write(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with replacing_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
