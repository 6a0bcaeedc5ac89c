"""The subjects of the granularity study: two trained models, each captured once, and the data.

subject = language_model(settings)                     the small decoder of tiny_lm.py
subject.compiled("fp8_tile{k_block=64}", factor=100)   quantized, with outlier channels injected
sentences = sentence_model(settings)                   all-MiniLM-L6-v2, as examples/embed.py loads it
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import embed
import tiny_lm
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

import qcompiler
from qcompiler import Calibration, CompiledModel, Graph
from qcompiler.capture import capture
from qcompiler.ir import DType, Format
from qcompiler.schemes.named import Scheme, find, register
from qcompiler.schemes.pipelines import QuantizationSpec

INT8_TILES = "int8_tile_reference"
"""INT8 with the tiles and blocks of fp8_tile, to separate the effect of tiles from the effect of the format."""

register(
    Scheme(
        INT8_TILES,
        "INT8 in the tiles of fp8_tile: simulated only, for comparison.",
        spec=QuantizationSpec(Format(DType.i8, (1, 128)), Format(DType.i8, (128, 128))),
        options=("k_block",),
    )
)


@dataclass(frozen=True)
class Settings:
    """The size of the study.

    Attributes:
        sentences: Number of embedded sentences.
        calibration_sentences: Number of further sentences, for calibration.
        windows: Windows of the language model's context, spread over the held-out text.
        calibration_windows: Windows spread over the training text.
        batch: Windows or sentences per model call; a per-tensor scale covers one batch.
        channels: Channels with injected outliers, out of 256.
        factors: Factors by which the outliers are enlarged.
    """

    sentences: int = 400
    calibration_sentences: int = 64
    windows: int = 32
    calibration_windows: int = 16
    batch: int = embed.BATCH
    channels: tuple[int, ...] = (7, 91, 200)
    factors: tuple[float, ...] = (1, 3, 10, 30, 100)


QUICK = Settings(sentences=16, calibration_sentences=8, windows=4, calibration_windows=2, batch=8, factors=(1, 100))


@dataclass(frozen=True)
class SentenceModel:
    """all-MiniLM-L6-v2.

    Attributes:
        graph: The captured model.
        calibration: The calibration of the graph.
        batches: The embedded sentences: the graph's inputs, in order.
        want: The float model's embeddings, f32[sentences, 384].
    """

    graph: Graph
    calibration: Calibration
    batches: Sequence[tuple[Tensor, ...]]
    want: Tensor

    def compiled(self, scheme: str) -> CompiledModel:
        """The quantized model."""
        return compiled(self.graph, scheme, self.calibration)

    def embedded(self, model: CompiledModel) -> Tensor:
        """The embeddings of all sentences."""
        return torch.cat([embedding(model(*batch)[0], batch[self.mask]) for batch in self.batches])

    @property
    def mask(self) -> int:
        """The position of the attention mask among the inputs."""
        return [value.name for value in self.graph.inputs].index("attention_mask")


def sentence_model(settings: Settings) -> SentenceModel:
    """The captured model and its sentences; calibration uses the sentences after the embedded ones."""
    model, batches = embed.load(settings.sentences, "cpu")
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    more = embed.sentences(settings.sentences + settings.calibration_sentences)[settings.sentences :]
    graph = capture(model, kwargs=dict(batches[0])).graph
    names = [value.name for value in graph.inputs]

    def inputs(batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(batch[name] for name in names)

    chunks = [more[at : at + settings.batch] for at in range(0, len(more), settings.batch)]
    seen = [tokenizer(chunk, padding=True, truncation=True, max_length=128, return_tensors="pt") for chunk in chunks]
    want = torch.cat([embed.embed(model, batch) for batch in batches])
    return SentenceModel(graph, Calibration([inputs(batch) for batch in seen]), [inputs(b) for b in batches], want)


def embedding(hidden: Tensor, mask: Tensor) -> Tensor:
    """Normalized mean-pooled embeddings of a batch, f32[sentences, 384], as in embed.py."""
    return functional.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


@dataclass(frozen=True)
class LanguageModel:
    """The small decoder, with any outlier factor.

    Attributes:
        model: The trained weights, in f32.
        graph: The captured model, without outliers.
        settings: The size of the study.
        read: The model's input, i64[windows, context].
        wanted: The next tokens that it should predict.
        seen: The calibration input.
        float_losses: The float model's loss per window, in nats per byte.
    """

    model: tiny_lm.TinyLM
    graph: Graph
    settings: Settings
    read: Tensor
    wanted: Tensor
    seen: Tensor
    float_losses: Tensor
    _variants: dict[float, tuple[Graph, Calibration]] = field(default_factory=dict)

    def variant(self, factor: float) -> tuple[Graph, Calibration]:
        """The graph with outliers, and its calibration. Graphs for different factors differ only in weights."""
        if factor not in self._variants:
            graph = self.graph.clone()
            injected = tiny_lm.inject_outliers(self.model, factor, self.settings.channels)
            graph.weights.update({name: tensor.detach() for name, tensor in injected.named_parameters()})
            batches = [(part,) for part in self.seen.split(self.settings.batch)]
            self._variants[factor] = graph, Calibration(batches)
        return self._variants[factor]

    def compiled(self, scheme: str, factor: float = 1) -> CompiledModel:
        """The quantized model."""
        return compiled(self.variant(factor)[0], scheme, self.variant(factor)[1])

    def losses(self, model: CompiledModel) -> Tensor:
        """The mean loss per window, f32[windows], in nats per byte."""
        return window_losses(model, self.read, self.wanted, self.settings.batch)


def language_model(settings: Settings) -> LanguageModel:
    """The captured model and its windows: held-out text for evaluation, training text for calibration."""
    model = tiny_lm.load(dtype=torch.float32)
    read, wanted = spread_windows(tiny_lm.text(held_out=True), settings.windows)
    seen, _ = spread_windows(tiny_lm.text(held_out=False), settings.calibration_windows)
    graph = capture(model, (seen[:2],)).graph
    losses = window_losses(model, read, wanted, settings.batch)
    return LanguageModel(model, graph, settings, read, wanted, seen, losses)


def spread_windows(text: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` evenly spaced windows of a text: the input, and the byte that follows each of its bytes."""
    starts = torch.linspace(0, len(text) - tiny_lm.CONTEXT - 1, count).long().tolist()
    pieces = torch.stack([text[start : start + tiny_lm.CONTEXT + 1] for start in starts]).long()
    return pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()


@torch.no_grad()
def window_losses(model: torch.nn.Module, read: Tensor, wanted: Tensor, batch: int) -> Tensor:
    """The mean negative log-likelihood of each window, f32[windows], in nats per byte."""
    parts = zip(read.split(batch), wanted.split(batch), strict=True)
    return torch.cat([functional.cross_entropy(model(x).mT, y, reduction="none").mean(1) for x, y in parts])


def compiled(graph: Graph, scheme: str, calibration: Calibration) -> CompiledModel:
    """A quantized copy of a captured graph; schemes that need statistics share one calibration."""
    spec = find(scheme.partition("{")[0]).spec
    asked = calibration if spec is not None and spec.needs_calibration else None
    return qcompiler.compile(graph, scheme=scheme, calibration=asked, target="cpu")
