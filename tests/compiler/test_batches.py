"""Calibration data as users have them: tensors, tuples and dicts, in lists, loaders and generators."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import qcompiler
from qcompiler.capture import capture
from qcompiler.capture.signature import Signature
from qcompiler.errors import InputError
from qcompiler.program.batches import Batches, as_call


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
        y: Tensor = self.linear(x) + shift
        return y


@pytest.fixture(scope="module")
def signature() -> Signature:
    return capture(Two().eval(), (torch.ones(3, 4),), {"shift": torch.ones(())}).signature


def batch(seed: int) -> dict[str, Tensor]:
    return {"x": torch.full((2 + seed, 4), float(seed)), "shift": torch.tensor(seed + 0.5)}


def test_what_a_batch_stands_for() -> None:
    x = torch.ones(2)
    assert as_call(x, 0) == ((x,), {})
    assert as_call((x, 1), 0) == ((x, 1), {}) and as_call([x], 0) == ((x,), {})
    assert as_call({"x": x}, 0) == ((), {"x": x}) and as_call((), 0) == ((), {})
    for wrong in (3, "x", None, {x}):
        with pytest.raises(InputError) as error:
            as_call(wrong, 4)
        assert str(error.value) == (
            f"a call of the model has the wrong type: got {type(wrong).__name__}; need a tensor, a tuple of arguments, "
            "or a dict of arguments by name (in batches[4])"
        )


@pytest.mark.parametrize("source", [torch.ones(2, 4), "abc", b"abc", {"x": torch.ones(2)}, 3, None, len])
def test_what_holds_no_batches(source: Any) -> None:
    with pytest.raises(InputError, match=r"calibration has the wrong type: got .*; need an iterable of calls") as error:
        Batches(source)
    assert ("Put the one batch into a list." in str(error.value)) == isinstance(source, Tensor | dict)


@pytest.mark.parametrize("before", [0, 1])
def test_a_source_that_fails(before: int) -> None:
    """The error is the user's, and names the batch; before the capture and while a pass calibrates."""

    def batches() -> Iterator[Tensor]:
        for _ in range(before):
            yield torch.ones(2, 64)
        raise OSError("the disk is full")

    with pytest.raises(InputError) as error:
        qcompiler.compile(nn.Linear(64, 64).eval(), scheme="int8_tensor_static", calibration=batches())
    assert str(error.value).startswith("the calibration data cannot be read: got OSError: the disk is full")
    assert f"batches[{before}]" in str(error.value)


def test_a_list_can_be_read_again_and_again(signature: Signature) -> None:
    batches = Batches([batch(0), batch(1)])
    assert batches.first()[1]["shift"] == 0.5
    flat = batches.flattened(signature)
    assert not isinstance(flat, Iterator) and len(flat) == 2  # type: ignore[arg-type]  # a list's is sized
    for _ in range(2):
        assert [inputs[0].shape[0] for inputs in flat] == [2, 3]
        assert [float(inputs[1]) for inputs in flat] == [0.5, 1.5]


def test_a_loader_is_no_iterator(signature: Signature) -> None:
    def together(rows: Any) -> dict[str, Tensor]:
        return {"x": torch.stack([row for (row,) in rows]), "shift": torch.tensor(0.5)}

    loader: Any = DataLoader(TensorDataset(torch.randn(6, 4)), batch_size=3, collate_fn=together)
    flat = Batches(loader).flattened(signature)
    assert len(flat) == 2 == len(list(flat)) == len(list(flat))  # type: ignore[arg-type]  # a loader is sized


def test_a_generator_is_read_once_and_its_first_batch_counts(signature: Signature) -> None:
    read: list[int] = []

    def source() -> Iterator[dict[str, Tensor]]:
        for seed in range(3):
            read.append(seed)
            yield batch(seed)

    batches = Batches(source())
    assert not read
    for _ in range(2):
        assert batches.first()[1]["x"].shape == (2, 4) and read == [0]
    flat = batches.flattened(signature)
    assert isinstance(flat, Iterator) and read == [0]
    assert [float(inputs[1]) for inputs in flat] == [0.5, 1.5, 2.5]
    assert list(flat) == []


def test_no_batch_at_all() -> None:
    empty: Any
    for empty in ([], iter([])):
        with pytest.raises(InputError, match="there is no calibration data: got no batches; need at least one batch"):
            Batches(empty).first()


def test_a_batch_that_does_not_fit_is_named(signature: Signature) -> None:
    wrong = batch(1) | {"x": torch.ones(2, 5)}
    with pytest.raises(InputError) as error:
        list(Batches([batch(0), wrong]).flattened(signature))
    assert "of x has a different size than at capture: got 5; need 4" in str(error.value)
    assert error.value.where is not None and error.value.where.startswith("batches[1] of the calibration")
    with pytest.raises(InputError, match=r"the argument 'shift' is missing.*\(in batches\[0\] of the calibration"):
        list(Batches([torch.ones(2, 4)]).flattened(signature))
