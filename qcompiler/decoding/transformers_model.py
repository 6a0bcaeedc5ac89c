"""A decoder as a model of transformers: `model.generate`, pipelines, and evaluation harnesses.

    model = llm.for_transformers()
    model.generate(**tokenizer(texts, padding=True, return_tensors="pt"), max_new_tokens=20)

transformers is imported here only, so this module is loaded when it is needed.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qcompiler.decoding.generator import Generator
from qcompiler.decoding.prefixes import Prefixes
from qcompiler.decoding.step import Step, all_logits, step_inputs
from qcompiler.errors import InputError


class DecoderForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]  # few of its types exist
    """A causal language model that computes with a decoder and its cache.

    Each call gets whole sequences, as `generate` passes them to models without a cache argument. Tokens that the cache
    already holds from the last call are not computed again.

    Args:
        config: The configuration of the original model.
        generator: The decoder.
        every: Returns the step that computes the logits of all positions, [B, S, V].
        generation: Entries of the original model's generation configuration.
    """

    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True

    def __init__(
        self, config: Any, generator: Generator, every: Callable[[], Step], generation: dict[str, Any]
    ) -> None:
        config = copy.deepcopy(config)
        config._attn_implementation = config._experts_implementation = "eager"  # of a model that does not run
        super().__init__(config)
        self.generation_config = GenerationConfig.from_dict(generation)
        self._generator, self._every = generator, every
        self._prefixes, self._runs = Prefixes(generator.step), -1
        self.eval()  # type: ignore[no-untyped-call]

    @property
    def device(self) -> torch.device:
        """The device of inputs and logits."""
        return self._generator.step.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the original model."""
        found = self.config.dtype
        return found if isinstance(found, torch.dtype) else torch.get_default_dtype()

    def _prepare_cache_for_generation(self, *_: Any, **__: Any) -> bool:
        """Makes no cache: the decoder has its own."""
        return False

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> dict[str, Any]:
        """Returns the arguments of `forward` for whole sequences."""
        return {
            "input_ids": input_ids, "attention_mask": attention_mask,
            "logits_to_keep": options.get("logits_to_keep", 0),
        }  # fmt: skip

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutput:
        """Computes logits, float[B, S, V], or of the last `logits_to_keep` positions.

        Args:
            input_ids: i64[B, S].
            attention_mask: [B, S]: 1 for tokens, 0 for padding at the beginning or end of a row. Logits of padding are
                zero.
            labels: i64[B, S], for the loss; -100 is ignored.
            logits_to_keep: 0 for all positions.

        Raises:
            InputError: A row is empty, longer than the cache, or has padding between tokens.
        """
        spans = spans_of(input_ids, attention_mask, self._generator.step.capacity)
        if (runs := self._generator.runs) != self._runs:  # the decoder itself wrote to the cache
            self._prefixes.forget()
            self._runs = runs
        rows = [ids[first:end] for ids, (first, end) in zip(input_ids.tolist(), spans, strict=True)]
        if logits_to_keep == 1 and all(end == input_ids.shape[1] for _, end in spans):
            logits = self._prefixes.last_logits(rows)[:, None]
        else:
            logits = self._all_logits(rows, spans, input_ids.shape[1])[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return CausalLMOutput(loss=loss, logits=logits)

    def _all_logits(self, rows: list[list[int]], spans: list[tuple[int, int]], width: int) -> Tensor:
        """The logits of all positions, [B, width, V]."""
        self._prefixes.forget()
        step = self._every()
        found = []
        for at in range(0, len(rows), step.slots):
            for row, (first, end) in zip(
                whole_rows(step, rows[at : at + step.slots]), spans[at : at + step.slots], strict=True
            ):
                placed = row.new_zeros(width, row.shape[-1])
                placed[first:end] = row
                found.append(placed)
        return torch.stack(found)


def whole_rows(step: Step, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Returns the logits of all positions of each row, [len(row), V], in as few calls as the step allows."""
    parts: list[list[Tensor]] = [[] for _ in rows]
    for start in range(0, max(map(len, rows)), step.chunk):
        live = [slot for slot, row in enumerate(rows) if len(row) > start]
        given = [rows[slot][start : start + step.chunk] for slot in live]
        logits = all_logits(step(*step_inputs(live, given, [start] * len(live), step.device), start))
        for slot, ids, row in zip(live, given, logits, strict=True):
            parts[slot].append(row[: len(ids)])
    return [torch.cat(each) for each in parts]


def spans_of(input_ids: Tensor, mask: Tensor | None, capacity: int) -> list[tuple[int, int]]:
    """Returns first and end of the tokens in each row; InputError unless they are contiguous and fit the cache."""
    count, width = input_ids.shape
    found = [(0, width)] * count
    if mask is not None:
        if mask.shape != input_ids.shape:
            raise InputError("the attention mask has another shape than the ids", got=list(mask.shape),
                             need=list(input_ids.shape))  # fmt: skip
        kept = mask.bool().cpu()
        firsts, sizes = kept.int().argmax(-1).tolist(), kept.sum(-1).tolist()
        found = [(first, first + size) for first, size in zip(firsts, sizes, strict=True)]
        for number, (first, end) in enumerate(found):
            if not kept[number, first:end].all():
                raise InputError("the attention mask hides tokens between others", got=f"row {number}",
                                 need="padding at the beginning or the end of a row")  # fmt: skip
    for number, (first, end) in enumerate(found):
        if not 0 < end - first <= capacity:
            raise InputError("the decoder cannot hold a row", got=f"{end - first} tokens in row {number}",
                             need=f"1 to max_length={capacity}")  # fmt: skip
    return found


def as_transformers(
    config: Any, generator: Generator, every: Callable[[], Step], generation: dict[str, Any]
) -> PreTrainedModel:
    """Returns a decoder as a model, under the class name of the original model, by which pipelines know its task."""
    usual = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, DecoderForCausalLM.__name__)
    names = getattr(config, "architectures", None) or ([usual] if isinstance(usual, str) else usual)
    kind = type(str(names[0]), (DecoderForCausalLM,), {"__doc__": DecoderForCausalLM.__doc__})
    return kind(config, generator, every, generation)  # type: ignore[no-any-return]  # a class made at run time
