"""The tokens that end an answer, as the model's files declare them."""

from collections.abc import Iterable, Mapping
from typing import Any


def stop_tokens_of(generation: Mapping[str, Any], config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Returns the end-of-text tokens of the first source that declares some: transformers' own order.

    Args:
        generation: Entries of `generation_config.json`.
        config: The model's configuration; None if there is none.
        tokenizer: None if there is none.
    """
    sources = (generation.get("eos_token_id"), getattr(config, "eos_token_id", None),
               getattr(tokenizer, "eos_token_id", None))  # fmt: skip
    for found in sources:
        tokens = found if isinstance(found, Iterable) else (found,)
        if ids := tuple(token for token in tokens if isinstance(token, int) and token >= 0):
            return ids
    return ()
