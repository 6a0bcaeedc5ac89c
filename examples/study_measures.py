"""The measurements of the granularity study: each function returns the rows of one CSV file.

A row maps columns to text or numbers; numbers are written with seven significant digits.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import track
from study_subjects import INT8_TILES, LanguageModel, SentenceModel
from torch import Tensor

import qcompiler
from qcompiler.schemes.named import SCHEMES

Row = dict[str, Any]

QUICK_SCHEMES = ("fp8_tile", "int8_tensor_static")

OPTIONS = (
    "smoothquant_o3{alpha=search}", "smoothquant_o3{alpha=learn}", "smoothquant_o3{w=channel}",
    "smoothquant_o3{alpha=search, w=channel}", "smoothquant_o3{pow2=true}", "smoothquant_o3{observer=percentile}",
    "smoothquant_o3{observer=mse}", "int8_tensor_static{observer=percentile}", "int8_tensor_static{observer=mse}",
    "fp8_tile{scale=ue8m0}", "fp8_tile{dtype=f8e5m2}",
)  # fmt: skip
SENTENCE_OPTIONS = (
    "smoothquant_o1{w=channel}",
    "smoothquant_o2{w=channel}",
    "smoothquant_o2{alpha=search}",
    "smoothquant_o2{alpha=search, w=channel}",
)
QUICK_OPTIONS = ("smoothquant_o3",)

K_BLOCKS = (32, 64, 128, 256, 512, -1)
QUICK_K_BLOCKS = (64,)


def all_schemes() -> tuple[str, ...]:
    """All registered schemes, including the study's own."""
    return tuple(SCHEMES)


def sentence_rows(subject: SentenceModel, schemes: Sequence[str], what: str) -> list[Row]:
    """Embedding quality relative to the float model, and the layer with the largest error of its own."""
    rows = []
    batch = subject.batches[len(subject.batches) // 2]
    for scheme in track(schemes, what):
        model = subject.compiled(scheme)
        worst = qcompiler.attribute_error(model, batch, subject.graph).rows[0]
        rows.append(
            {"scheme": scheme, **embedding_error(subject.want, subject.embedded(model)),
             "worst_layer": worst.module, "worst_layer_db": worst.own}
        )  # fmt: skip
    return rows


def embedding_error(want: Tensor, got: Tensor) -> Row:
    """Cosine similarity of embeddings to the float model's, and the share of unchanged nearest neighbors."""
    cosine = (want.double() * got.double()).sum(1)
    nearest, wanted = ((each @ each.T).fill_diagonal_(-1).argmax(1) for each in (got, want))
    same = (nearest == wanted).double()
    return {
        "cosine_mean": float(cosine.mean()),
        "cosine_worst": float(cosine.min()),
        "error_mean": float(1 - cosine.mean()),
        "error_worst": float(1 - cosine.min()),
        "nearest_same": float(same.mean()),
    }


def language_rows(subject: LanguageModel, schemes: Sequence[str], factors: Sequence[float], what: str) -> list[Row]:
    """The loss on held-out text for each scheme and each outlier factor."""
    tasks = [(scheme, factor) for factor in factors for scheme in schemes]
    return [
        {"scheme": scheme, "factor": factor, **loss_increase(subject, subject.losses(subject.compiled(scheme, factor)))}
        for scheme, factor in track(tasks, what)
    ]


def loss_increase(subject: LanguageModel, losses: Tensor) -> Row:
    """The mean loss, its increase over the float model, and the standard error of that increase over the windows.

    The difference is taken per window, which cancels variation in difficulty between windows.
    """
    more = losses.double() - subject.float_losses.double()
    return {
        "loss": float(losses.double().mean()),
        "perplexity": math.exp(float(losses.double().mean())),
        "increase": float(more.mean()),
        "standard_error": float(more.std() / math.sqrt(len(more))),
    }


def float_rows(subject: LanguageModel) -> list[Row]:
    """The float model on all windows, and on each half of them."""
    half = len(subject.float_losses) // 2
    parts = {"all": subject.float_losses, "first half": subject.float_losses[:half]}
    parts["second half"] = subject.float_losses[half:]
    rows = [
        {"windows": name, "bytes": part.numel() * subject.read.shape[1], "loss": float(part.double().mean()),
         "perplexity": math.exp(float(part.double().mean()))}
        for name, part in parts.items()
    ]  # fmt: skip
    return rows


def sweep_rows(
    sentences: SentenceModel, language: LanguageModel, sizes: Sequence[int], factors: Sequence[float]
) -> list[Row]:
    """Error for each tile width, in both formats. Weight blocks stay 128 x 128."""
    tasks = [(scheme, size) for scheme in ("fp8_tile", INT8_TILES) for size in sizes]
    rows: list[Row] = []
    for scheme, size in track(tasks, "widths of tiles"):
        text = f"{scheme}{{k_block={size}}}"
        embedded = sentences.embedded(sentences.compiled(text))
        error = embedding_error(sentences.want, embedded)["error_mean"]
        row: Row = {"scheme": scheme, "k_block": size, "cosine_error": error}
        for factor in factors:
            found = loss_increase(language, language.losses(language.compiled(text, factor)))
            row |= {f"increase_{factor:g}": found["increase"], f"standard_error_{factor:g}": found["standard_error"]}
        rows.append(row)
    return rows


def check_finite(rows: Sequence[Row]) -> None:
    """Ends the program at the first row that is not finite: such a study is invalid."""
    for row in rows:
        if bad := [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]:
            raise SystemExit(f"{bad[0]} is not finite in {row}; torch {torch.__version__}")
