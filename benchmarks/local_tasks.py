"""Tasks for lm-eval over local files, made from Python's standard library.

    task = local_task(folder, "continuations", [*continuations()], output_type="multiple_choice", …)

lm-eval is imported when a task is made.
"""

import ast
import json
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

CHOICES = 4
PER_MODULE = 3
"""Sentences of one module that are asked for, at most."""
WORDS = (10, 24)
"""Least and most words of a sentence."""
WORD = re.compile(r"[(\"']?[A-Za-z'-]+[)\"']?[.,:;!?]?")


def local_task(folder: Path, name: str, docs: Sequence[dict[str, Any]], **how: Any) -> Any:
    """An lm-eval task over documents, which are written to a file."""
    file = folder / f"{name}.json"
    file.write_text("\n".join(map(json.dumps, docs)), encoding="utf-8")
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    kind = import_module("lm_eval.api.task").ConfigurableTask
    return kind(config={"task": name, **data, "metadata": {"version": 1}, **how})


def continuations() -> Iterator[dict[str, Any]]:
    """Questions: the first half of a sentence, four second halves from docstrings of one module, and the right one."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")):
        halves = dict(split_sentences(path))
        if len(halves) < CHOICES:
            continue
        shuffle = random.Random(path.stem)
        starts = [*halves]
        shuffle.shuffle(starts)
        for start in starts[:PER_MODULE]:
            choices = [start, *shuffle.sample([other for other in starts if other != start], CHOICES - 1)]
            shuffle.shuffle(choices)
            yield {
                "question": start,
                "choices": [f" {halves[each]}" for each in choices],
                "answer": choices.index(start),
            }


def split_sentences(path: Path) -> Iterator[tuple[str, str]]:
    """Both halves of sentences in the docstrings of a module, by words."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    seen = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
            for sentence in re.split(r"(?<=[.!?])\s+", paragraph):
                words = sentence.split()
                start, end = " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])
                prose = all(map(WORD.fullmatch, words)) and sentence.endswith(".")
                if prose and WORDS[0] <= len(words) <= WORDS[1] and end not in seen:
                    seen.add(end)
                    yield start, end
