"""Calling conventions: accepted calls, and the error message for each rejected one."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from qcompiler.capture import Signature, capture
from qcompiler.capture.signature import linear, solve
from qcompiler.errors import InputError
from qcompiler.interpreter import interpret
from qcompiler.ir.sizes import parse_size


class Model(torch.nn.Module):
    def forward(
        self,
        x: torch.Tensor,
        scale: float = 2.0,
        mask: torch.Tensor | None = None,
        *,
        batch: dict[str, Any],
        flag: bool = True,
    ) -> dict[str, torch.Tensor]:
        y = x * scale + batch["bias"]
        return {"y": y if flag else -y, "z": batch["pair"][0] @ x}


@pytest.fixture(scope="module")
def signature() -> Signature:
    return capture(Model().eval(), (torch.randn(3, 4), 2.0), {"batch": batch(3, 4)}).signature


def batch(rows: int, columns: int) -> dict[str, Any]:
    return {"bias": torch.randn(columns), "pair": [torch.randn(5, rows), 7]}


def test_the_shape_of_a_signature(signature: Signature) -> None:
    assert signature.input_names == ("x", "batch_bias", "batch_pair_0")
    assert [slot.path for slot in signature.slots] == [
        "x",
        "scale",
        "batch['bias']",
        "batch['pair'][0]",
        "batch['pair'][1]",
    ]
    assert signature.device == torch.device("cpu")
    assert signature.output_paths() == ["['y']", "['z']"]


def test_flatten_gives_the_inputs_in_order(signature: Signature) -> None:
    x, rest = torch.randn(6, 5), batch(6, 5)
    inputs = signature.flatten((x, 2.0), {"batch": rest})
    assert [id(t) for t in inputs] == [id(x), id(rest["bias"]), id(rest["pair"][0])]


def test_arguments_may_be_given_by_name_and_defaults_left_out(signature: Signature) -> None:
    x, rest = torch.randn(3, 4), batch(3, 4)
    expected = [id(x), id(rest["bias"]), id(rest["pair"][0])]
    assert [id(t) for t in signature.flatten((x,), {"batch": rest})] == expected
    assert [id(t) for t in signature.flatten((), {"batch": rest, "x": x, "scale": 2.0})] == expected
    assert [id(t) for t in signature.flatten((x,), {"batch": rest, "mask": None, "flag": True})] == expected


def test_unflatten_rebuilds_the_result_of_the_model(signature: Signature) -> None:
    y, z = torch.zeros(1), torch.ones(1)
    assert signature.unflatten([y, z]) == {"y": y, "z": z}


WRONG: list[tuple[str, Any, str]] = [
    ("missing", lambda x, b: ((), {"batch": b}), "the argument 'x' is missing: need x, scale, batch"),
    ("unknown", lambda x, b: ((x,), {"batch": b, "maks": x}), "the argument 'maks' was not given at capture"),
    ("not the default", lambda x, b: ((x,), {"batch": b, "flag": False}), "'flag' was not given at capture"),
    ("given twice", lambda x, b: ((x,), {"batch": b, "x": x}), "the argument 'x' is given twice"),
    (
        "other keys",
        lambda x, b: ((x,), {"batch": {"bias": b["bias"]}}),
        "'batch' has a different structure .* got dict with bias; need dict with bias, pair",
    ),
    ("a longer list", lambda x, b: ((x,), {"batch": {**b, "pair": [x, 7, 7]}}), "'batch' has a different structure"),
    ("no tensor", lambda x, b: ((3,), {"batch": b}), "x must be a tensor: got 3; need torch.float32 of rank 2"),
    ("dtype", lambda x, b: ((x.double(),), {"batch": b}), "different dtype .* got torch.float64; need torch.float32"),
    ("device", lambda x, b: ((x.to("meta"),), {"batch": b}), "x is on a different device .* got meta; need cpu"),
    ("rank", lambda x, b: ((x[0],), {"batch": b}), r"x has a different rank .* got \(4,\); need \[s0, s1\]"),
    (
        "contradiction",
        lambda x, b: ((x[:2],), {"batch": b}),
        r"dimension 1 of batch\['pair'\]\[0\] contradicts another input: got 3; need 2",
    ),
    ("constant", lambda x, b: ((x, 3.0), {"batch": b}), "scale is part of the captured .* got 3.0; need 2.0"),
    ("constant of another type", lambda x, b: ((x, 2), {"batch": b}), "scale is part of the captured graph"),
    (
        "nested constant",
        lambda x, b: ((x,), {"batch": {**b, "pair": [b["pair"][0], 8]}}),
        r"batch\['pair'\]\[1\] is part of the captured graph and cannot change: got 8; need 7",
    ),
]


@pytest.mark.parametrize(("make", "sentence"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_calls_get_an_explanation(signature: Signature, make: Any, sentence: str) -> None:
    args, kwargs = make(torch.randn(3, 4), batch(3, 4))
    with pytest.raises(InputError, match=sentence):
        signature.flatten(args, kwargs)


def test_a_size_that_capture_fixed_is_refused() -> None:
    layer = torch.nn.Linear(4, 2).eval()
    fixed = capture(layer, (torch.randn(3, 4),), dynamic_shapes=None).signature
    with pytest.raises(InputError, match="dimension 0 of input has a different size than at capture: got 5; need 3"):
        fixed.flatten((torch.randn(5, 4),))


class Branch(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x * 2 if x.shape[0] > 3 else x * 3
        return x.sum() + y.sum() if x.shape[0] > y.shape[0] else x.sum() - y.sum()


def test_sizes_that_would_take_another_branch_are_refused() -> None:
    captured = capture(Branch().eval(), (torch.randn(6, 2), torch.randn(4, 2)))
    x, y = torch.randn(9, 2), torch.randn(7, 2)
    (out,) = interpret(captured.graph, captured.signature.flatten((x, y)))
    assert torch.equal(out, Branch()(x, y))
    with pytest.raises(
        InputError, match=r"dimension 0 of x is outside the captured range: got 3; need s0 with s0 in 4\.\."
    ):
        captured.signature.flatten((torch.randn(3, 2), torch.randn(2, 2)))
    with pytest.raises(InputError, match=r"a different branch for these sizes: got s0 = 5, s2 = 5; need s0 > s2"):
        captured.signature.flatten((torch.randn(5, 2), torch.randn(5, 2)))


@dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor


def test_a_call_is_traceable_by_dynamo(signature: Signature) -> None:
    def run(x: torch.Tensor, rest: dict[str, Any]) -> Any:
        inputs = signature.flatten((x, 2.0), {"batch": rest})
        return signature.unflatten([inputs[0] + 1, inputs[2] * 2])

    compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=True)
    for rows in (3, 6):
        x, rest = torch.randn(rows, 4), batch(rows, 4)
        got, want = compiled(x, rest), run(x, rest)
        assert torch.equal(got["y"], want["y"]) and torch.equal(got["z"], want["z"])


SOLVED: list[tuple[str, int, Any]] = [
    ("s0", 7, ("s0", 7)),
    ("4*s0", 8, ("s0", 2)),
    ("4*s0", 9, ("s0", None)),
    ("2*s0 - 1", 9, ("s0", 5)),
    ("s0*s1", 6, None),
    ("s0 + s1", 6, None),
]


@pytest.mark.parametrize(("size", "number", "solved"), SOLVED)
def test_solving_a_size_for_its_symbol(size: str, number: int, solved: Any) -> None:
    assert solve(parse_size(size), number) == solved
    assert (linear(parse_size(size)) is None) == (solved is None)
