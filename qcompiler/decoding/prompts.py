"""What users give as prompts, and the token ids of each.

"text"                                  tokenized as it is
[{"role": "user", "content": "…"}]      through the tokenizer's chat template
[5, 9, 31], or a tensor                 ids
a list of these, or i64[B, S]           several prompts
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qcompiler.errors import InputError

NEED = "a text, a list of chat messages, a list of token ids, or a list of these"


@dataclass(frozen=True)
class Prompt:
    """The ids of one prompt, and whether its answer is a text or a list of ids."""

    ids: Sequence[int]
    is_text: bool


def prompts_of(given: Any, tokenizer: Any) -> tuple[list[Prompt], bool]:
    """Returns the prompts, and whether several were given.

    Raises:
        InputError: They are of a wrong type, or need a tokenizer or a chat template that is missing.
    """
    given = given.tolist() if isinstance(given, Tensor) else given
    if isinstance(given, str) or _is_chat(given) or _is_ids(given):
        return [prompt_of(given, tokenizer)], False
    if not isinstance(given, Sequence):
        raise InputError("the prompt is of a wrong type", got=type(given).__name__, need=NEED)
    return [prompt_of(each, tokenizer) for each in given], True


def prompt_of(given: Any, tokenizer: Any) -> Prompt:
    """Returns one prompt; raises InputError as `prompts_of` does."""
    given = given.tolist() if isinstance(given, Tensor) else given
    if isinstance(given, str):
        return Prompt(needed(tokenizer, "a text prompt")(given)["input_ids"], True)
    if _is_chat(given):
        return Prompt(_chat(given, needed(tokenizer, "a chat")), True)
    if isinstance(given, Sequence):
        return Prompt(given, False)
    raise InputError("the prompt is of a wrong type", got=type(given).__name__, need=NEED)


def needed(tokenizer: Any, what: str) -> Any:
    """Returns the tokenizer; InputError if there is none."""
    if tokenizer is None:
        fix = "Give tokenizer=, make the decoder from a folder with a tokenizer, or give lists of token ids."
        raise InputError(f"{what} needs a tokenizer, and the decoder has none", fix=fix)
    return tokenizer


def _is_chat(given: Any) -> bool:
    return isinstance(given, Sequence) and len(given) > 0 and isinstance(given[0], Mapping)


def _is_ids(given: Any) -> bool:
    """Whether this is one list of ids, perhaps with wrong ones; an empty list is an empty prompt."""
    return isinstance(given, Sequence) and not any(isinstance(each, Sequence | Tensor | Mapping) for each in given)


def _chat(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        fix = "Give the prompt as a text in the model's own format."
        raise InputError("the tokenizer has no chat template", got="a list of messages", fix=fix)
    if wrong := [each for each in messages if not isinstance(each, Mapping) or not {"role", "content"} <= each.keys()]:
        raise InputError("a message of a chat is malformed", got=repr(wrong[0]), need='{"role": …, "content": …}')
    made = tokenizer.apply_chat_template(
        [dict(each) for each in messages], add_generation_prompt=True, return_dict=True
    )
    return list(made["input_ids"])
