"""What a model's configuration says about its tokens: how long a sequence may be."""

from typing import Any

from qcompiler.errors import InputError

LONGEST = 4096
"""Default maximum length of a sequence, if the model allows it."""


def text_config(config: Any) -> Any:
    """Returns the language part of a model's configuration; None for a model without one."""
    return config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config


def checked_length(given: int | None, config: Any) -> int:
    """Returns the maximum length of a sequence; InputError if the model has fewer positions."""
    positions = getattr(text_config(config), "max_position_embeddings", None)
    limit = positions if isinstance(positions, int) and positions > 0 else None
    if given is None:
        return min(LONGEST, limit or LONGEST)
    if limit is not None and isinstance(given, int) and given > limit:
        raise InputError("the model has fewer positions than max_length", got=given, need=f"at most {limit}")
    return given
