"""What each scheme costs a trained language model, SmolLM2-135M-Instruct, and which layers it costs.

    make study                                               or: python examples/smollm2_study.py
    python examples/smollm2_study.py --only smollm2_layers   one part
    python examples/smollm2_study.py --schemes fp8_tile      measures these schemes again, and keeps the other rows

Writes docs/granularity/smollm2*.csv, and fills the tables of docs/granularity.md from them. The model runs in bf16 on
the CPU, with the CPU kernels of the quantized operations.
"""

import argparse
import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import smollm2
import study_tables as tables
import torch
import transformers
from granularity_study import OUTPUT, PAGE, save, versions, write
from smollm2_rounding import SPIKES, rounding_rows
from smollm2_weights import weight_rows
from study_measures import Row
from torch import Tensor

import qcompiler
from qcompiler import Calibration, CompiledModel, Graph
from qcompiler.capture import capture
from qcompiler.schemes.named import SCHEMES, Scheme, register
from qcompiler.schemes.pipelines import QuantizationSpec

UNSMOOTHED = "int8_row_tensor_reference"
"""The granularity of smoothquant_o1 without smoothing."""

register(
    Scheme(
        UNSMOOTHED,
        "INT8: one scale per token; one for the weight: smoothquant_o1 without smoothing, for comparison.",
        spec=QuantizationSpec(SCHEMES["smoothquant_o1"].spec.x, SCHEMES["smoothquant_o1"].spec.w),
    )
)
MIXED = "smoothquant_o1 with w=channel in two layers"
"""smoothquant_o1, and one scale per output channel for the weights of SPIKES."""
BY_CHANNEL = "smoothquant_o1{w=channel}"
OPTIONS = (
    UNSMOOTHED, "smoothquant_o1{alpha=0.1}", "smoothquant_o1{alpha=search}", BY_CHANNEL, MIXED,
    "smoothquant_o1{alpha=search, w=channel}", "smoothquant_o3{w=channel}",
)  # fmt: skip
CACHES = (None, "fp8", "int8")
FLOAT = "bf16"
"""The model without quantization, in tables."""
ATTRIBUTED = ("fp8_tile", UNSMOOTHED, "smoothquant_o1", BY_CHANNEL)
WEIGHTS, ROUNDING = "smollm2_weights", "smollm2_rounding"
WORST = 3
"""Rows of each scheme in the table of layers."""


@dataclass(frozen=True)
class Settings:
    """The size of the study.

    Attributes:
        windows: Texts of 256 tokens whose loss is measured.
        calibration_windows: Further texts, for calibration.
        prompts: Texts that the model continues greedily.
        prompt: Tokens of a text that it is given.
        new: Tokens that it adds.
        attributed: Tokens of the text whose error is attributed.
    """

    windows: int = 6
    calibration_windows: int = 6
    prompts: int = 6
    prompt: int = 32
    new: int = 48
    attributed: int = 32


@dataclass(frozen=True)
class Subject:
    """The captured model and its texts.

    Attributes:
        model: The model in bf16.
        tokenizer: Its tokenizer.
        settings: The size of the study.
    """

    model: Any
    tokenizer: Any
    settings: Settings

    @cached_property
    def texts(self) -> list[Tensor]:
        """The texts, i64[1, 256] each: the measured ones, then those for calibration."""
        return smollm2.windows(self.tokenizer, self.settings.windows + self.settings.calibration_windows)

    @cached_property
    def graph(self) -> Graph:
        """The model, captured once."""
        ids = torch.cat(self.texts[:2])
        return capture(self.model, kwargs={"input_ids": ids, "position_ids": places(ids)}).graph

    @cached_property
    def calibration(self) -> Calibration:
        """The statistics of the graph, shared by all schemes."""
        return Calibration([(ids, places(ids)) for ids in self.texts[self.settings.windows :]])

    def compiled(self, scheme: str) -> CompiledModel:
        """The quantized model."""
        overrides = dict.fromkeys(SPIKES, BY_CHANNEL) if scheme == MIXED else None
        return qcompiler.compile(
            self.graph, scheme=scheme.partition(" with ")[0], overrides=overrides, calibration=self.calibration,
            progress=False,
        )  # fmt: skip

    @torch.no_grad()
    def read(self, model: Any) -> tuple[Tensor, Tensor]:
        """The loss of each measured text, f64[windows], and the most likely next tokens, i64[windows, 255]."""
        losses, choices = [], []
        for ids in self.texts[: self.settings.windows]:
            shares = logits(model, ids)[:, :-1].float().log_softmax(-1)
            losses.append(-shares.gather(-1, ids[:, 1:, None]).double().mean())
            choices.append(shares[0].argmax(-1))
        return torch.stack(losses), torch.stack(choices)

    @cached_property
    def float_read(self) -> tuple[Tensor, Tensor]:
        """The same of the float model."""
        return self.read(self.model)

    @cached_property
    def continued(self) -> Tensor:
        """Prompts with the float model's greedy continuation, i64[prompts, prompt + new]."""
        given = torch.cat(self.texts[: self.settings.prompts])[:, : self.settings.prompt]
        new = self.settings.new
        found: Tensor = self.model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        return found

    @torch.no_grad()
    def greedy(self, model: Any) -> float:
        """How many tokens the model's greedy text begins with that are also the float model's, on average.

        The text is the same up to the first token that the model would not choose after the float model's text. The
        float model's text comes from a cache and a batch; without them, in bf16, its own text differs at some token.
        """
        counts = []
        for ids in self.continued:
            chosen = logits(model, ids[None])[0, self.settings.prompt - 1 : -1].argmax(-1)
            counts.append(int((chosen == ids[self.settings.prompt :]).long().cumprod(0).sum()))
        return sum(counts) / len(counts)


def places(ids: Tensor) -> Tensor:
    """The positions of tokens, i64 like `ids`."""
    return torch.arange(ids.shape[1]).expand(ids.shape).contiguous()


def logits(model: Any, ids: Tensor) -> Tensor:
    """The logits of a float or a compiled model, [B, S, V]."""
    found: Tensor = model(ids, places(ids)) if isinstance(model, CompiledModel) else model(ids).logits
    return found


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", choices=(*PARTS, WEIGHTS, ROUNDING), help="one part of the study (default: all parts)"
    )
    parser.add_argument("--schemes", help="measure only these again, separated by ';' (default: all)")
    parser.add_argument("--folder", type=Path, help="a Hugging Face folder instead of the installed model")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    subject = Subject(*smollm2.load(options.folder, "cpu"), Settings())
    chosen = None if options.schemes is None else [name.strip() for name in options.schemes.split(";")]
    texts, others = subject.texts[: subject.settings.windows], subject.texts[subject.settings.windows :]
    if options.only in (None, WEIGHTS):
        save(options.output / f"{WEIGHTS}.csv", weight_rows(subject.model, others))
    if options.only in (None, ROUNDING):
        save(options.output / f"{ROUNDING}.csv", rounding_rows(subject.model, texts, others))
    for part in (options.only,) if options.only in PARTS else PARTS if options.only is None else ():
        measure(PARTS[part], subject, options.output / f"{part}.csv", chosen)
    write(options.output / "smollm2.json", json.dumps(facts(subject.settings), indent=2) + "\n")
    if options.output.resolve() == OUTPUT:
        write(PAGE, tables.filled(PAGE.read_text(encoding="utf-8"), OUTPUT))


@dataclass(frozen=True)
class Part:
    """One CSV file of the study.

    Attributes:
        schemes: What it measures, in order.
        rows: Returns the rows of one scheme.
    """

    schemes: Sequence[str]
    rows: Callable[[Subject, str], Sequence[Row]]


def measure(part: Part, subject: Subject, path: Path, chosen: Sequence[str] | None) -> None:
    """Measures a part and writes its file after each scheme; rows of schemes that are not chosen are kept."""
    rows: dict[str, list[Row]] = {}
    if chosen is not None and path.exists():
        for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
            rows.setdefault(row["scheme"], []).append(dict(row))
    for scheme in part.schemes if chosen is None else chosen:
        if scheme in part.schemes:
            rows[scheme] = [{"scheme": scheme, **row} for row in part.rows(subject, scheme)]
            print(rows[scheme], flush=True)
            save(path, [row for name in part.schemes for row in rows.get(name, [])])


def scheme_rows(subject: Subject, scheme: str) -> list[Row]:
    """The loss of a scheme, and how much of the float model's greedy text remains."""
    model = subject.model if scheme == FLOAT else subject.compiled(scheme)
    losses, choices = subject.read(model)
    more = losses - subject.float_read[0]
    same = choices == subject.float_read[1]
    return [
        {
            "perplexity": math.exp(losses.mean()),
            "increase": float(more.mean()),
            "standard_error": float(more.std() / math.sqrt(len(more))),
            "same_choice": float(same.double().mean()),
            "greedy": subject.greedy(model),
        }
    ]


def cache_rows(subject: Subject, scheme: str) -> list[Row]:
    """The perplexity with each format of the cache."""
    found = []
    for cache in CACHES:
        llm = qcompiler.decoder(
            subject.model, scheme=None if scheme == FLOAT else scheme, kv_cache=cache, max_batch=1,
            max_length=smollm2.WINDOW, progress=False,
        )  # fmt: skip
        losses, _ = subject.read(llm.for_transformers())
        found.append({"cache": cache or "none", "perplexity": math.exp(losses.mean())})
    return found


def layer_rows(subject: Subject, scheme: str) -> list[Row]:
    """The layers that cost the logits most if only they are quantized, and how uneven their weights are."""
    ids = subject.texts[0][:, : subject.settings.attributed]
    report = qcompiler.attribute_error(subject.compiled(scheme), (ids, places(ids)), subject.graph, outputs=True)
    rows = sorted(report.rows, key=lambda row: row.outputs or 0)[:WORST]
    return [
        {"rank": rank, "layer": row.module.removeprefix("model."), "outputs_db": row.outputs, "own_db": row.own}
        for rank, row in enumerate(rows, 1)
    ]


PARTS = {
    "smollm2": Part((FLOAT, *(name for name in SCHEMES if name != UNSMOOTHED), *OPTIONS), scheme_rows),
    "smollm2_caches": Part((FLOAT, "fp8_tile"), cache_rows),
    "smollm2_layers": Part(ATTRIBUTED, layer_rows),
}


def facts(settings: Settings) -> dict[str, Any]:
    """The versions and settings of the measurement."""
    return versions() | {"transformers": transformers.__version__, "evaluation": "bf16, CPU"} | asdict(settings)


if __name__ == "__main__":
    main()
