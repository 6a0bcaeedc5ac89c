"""The questions that `make lm-eval` asks: which of four second halves continues a sentence."""

import abc
import inspect
from itertools import islice

from benchmarks.local_tasks import CHOICES, PER_MODULE, WORDS, continuations


def test_the_right_choice_is_the_rest_of_the_sentence() -> None:
    questions = [*islice(continuations(), 40)]
    assert questions == [*islice(continuations(), 40)], "the same in every run"
    wholes = [each["question"] + each["choices"][each["answer"]] for each in questions]
    assert len({*wholes}) == 40 and {len({*each["choices"]}) for each in questions} == {CHOICES}
    assert all(WORDS[0] <= len(whole.split()) <= WORDS[1] and whole.endswith(".") for whole in wholes)
    source = " ".join(inspect.getsource(abc).split())
    assert [whole in source for whole in wholes[: PER_MODULE + 1]] == [True] * PER_MODULE + [False], "abc comes first"
    assert {each["answer"] for each in questions} == {*range(CHOICES)}
