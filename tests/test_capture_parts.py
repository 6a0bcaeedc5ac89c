"""The parts of capture that are worth a test alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from qcompiler.capture.bounds import BoundsCheck
from qcompiler.capture.locations import short_path


def test_indices_out_of_range_raise_before_they_reach_a_device() -> None:
    x = torch.randn(4, 3)
    index = torch.tensor
    with BoundsCheck():
        assert x[index([0, -1])].shape == (2, 3) and x[x > 9].numel() == 0
        (
            functional.embedding(index([3]), x),
            x.gather(1, index([[2]])),
            x[:, index([2])],
            x.index_copy(0, index([3]), x[:1]),
        )
        out_of_range: list[Callable[[], Any]] = [
            lambda: x[index([4])],
            lambda: x[:, index([3])],
            lambda: functional.embedding(index([-1]), x),
            lambda: x.gather(1, index([[3]])),
            lambda: x.index_copy(0, index([4]), x[:1]),
            lambda: torch.zeros(3).scatter(0, index([3]), 1.0),
        ]
        for access in out_of_range:
            with pytest.raises(IndexError, match="out of range for"):
                access()


def test_locations_show_no_machine_paths() -> None:
    assert short_path("/usr/lib/python3.11/site-packages/transformers/models/a.py") == "transformers/models/a.py"
    assert short_path("/somewhere/else/model.py") == "model.py"
