"""NaN and infinity in compiled models: they reach the result, weights that have them are remarked on, and are found."""

import math
from collections.abc import Callable

import pytest
import torch
from decoding_models import llama
from torch import Tensor, nn

import qcompiler
from qcompiler.compiler.model import CompiledModel
from qcompiler.errors import CaptureError, InputError, QCompilerError
from qcompiler.interpreter import interpret

SCHEMES = ("fp8_tile", "fp8_row", "fp8_tensor", "int8_row", "int8_tensor", "fp8_tensor_static", "smoothquant_fp8")
ODD = (math.nan, math.inf, -math.inf)


class Gated(nn.Module):
    """Two layers that are merged, a gate that is fused with a quantization, and a third layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.gate, self.up, self.down = nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        result: Tensor = x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        return result


class Overflow(nn.Module):
    """A function that overflows, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.exp(x * 100) + self.first(x))
        return result


def rows(count: int = 5, width: int = 64) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0)).clamp(-0.8, 0.8)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def compiled(scheme: str, make: Callable[[], nn.Module] = lambda: nn.Linear(64, 48)) -> CompiledModel:
    calibration = [rows()] if "static" in scheme or "smooth" in scheme else None
    return qcompiler.compile(seeded(make), scheme=scheme, example_inputs=(rows(),), calibration=calibration)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_that_is_not_finite_stays_so_and_the_others_stay_as_they_are(scheme: str) -> None:
    fast = compiled(scheme)
    clean = fast(rows())
    for odd in ODD:
        x = rows()
        x[2, 17] = odd
        got = fast(x)
        lost = [0, 1, 2, 3, 4] if scheme == "int8_tensor" else [2]
        assert got.isnan().all(1).nonzero().flatten().tolist() == lost
        others = [row for row in range(5) if row not in lost]
        assert torch.equal(got[others], clean[others])


def test_a_static_int8_scale_loses_it_and_the_reference_finds_it() -> None:
    fast = compiled("int8_tensor_static")
    x = rows()
    x[2, 17], x[3, 3], x[3, 4] = math.nan, math.inf, -math.inf
    assert bool(fast(x).isfinite().all())
    found = qcompiler.find_nonfinite(fast, x)
    assert str(found) == (
        "%input = core.input has 1 NaN and 2 Inf in 320 elements, which reach %input_q = kernel.quantize_static"
    )
    assert qcompiler.find_nonfinite(fast, rows()) is None


@pytest.mark.parametrize("scheme", ["fp8_tile", "int8_row", "int8_tensor"])
def test_fused_operations_keep_what_is_not_finite(scheme: str) -> None:
    fast = compiled(scheme, Gated)
    x = rows()
    x[1, 5] = math.inf
    got = fast(x)
    torch.testing.assert_close(got, interpret(fast.graph, [x])[0], rtol=0, atol=0, equal_nan=True)
    assert got.isnan().any(1).nonzero().flatten().tolist() == ([0, 1, 2, 3, 4] if scheme == "int8_tensor" else [1])


@pytest.mark.gpu
@pytest.mark.parametrize("make", [Gated, lambda: nn.Linear(64, 48)])
@pytest.mark.parametrize(
    "scheme", ["fp8_tile", "fp8_row", "fp8_tensor", "fp8_tensor_static", "int8_row", "int8_tensor"]
)
def test_on_a_gpu_the_row_is_poisoned_by_the_kernels(scheme: str, make: Callable[[], nn.Module]) -> None:
    model, x = seeded(make).bfloat16().cuda(), rows(150).bfloat16().cuda()
    fast = qcompiler.compile(
        model, scheme=scheme, example_inputs=(x,), calibration=[x] if scheme.endswith("static") else None
    )
    clean = fast(x)
    for odd in ODD:
        bad = x.clone()
        bad[70, 17] = odd
        got = fast(bad)
        lost = list(range(150)) if scheme == "int8_tensor" else [70]
        assert got.isnan().all(1).nonzero().flatten().tolist() == lost, odd
        others = [row for row in range(150) if row not in lost]
        assert bool(got[others].isfinite().all())
        # One scale for the tensor may change with the row that it no longer covers.
        assert scheme == "fp8_tensor" or torch.equal(got[others], clean[others]), "another row has changed"


@pytest.mark.parametrize("scheme", ["fp8_tile", "int8_tensor_static"])
def test_the_origin_is_the_operation_that_overflows(scheme: str) -> None:
    fast = compiled(scheme, Overflow)
    x = rows()
    x[1, 2] = 3.0
    found = qcompiler.find_nonfinite(fast, (x,))
    assert found is not None
    assert (found.name, found.op, found.nan, found.inf, found.elements) == ("exp", "aten.exp", 0, 1, 320)
    assert found.where.startswith("at ") and "test_nonfinite.py:" in found.where
    assert "add" in found.reaches and "_q = kernel.quantize" in found.reaches


def test_infinities_that_get_no_further_are_no_finding() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            future = torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).triu(1)
            weights = (x @ x.T).masked_fill(future, -math.inf).softmax(-1)
            result: Tensor = self.proj(weights @ x)
            return result

    fast = compiled("fp8_tile", Masked)
    assert bool(fast(rows()).isfinite().all()) and qcompiler.find_nonfinite(fast, rows()) is None
    x = rows()
    x[3, 0] = math.nan
    found = qcompiler.find_nonfinite(fast, {"x": x})
    assert found is not None and (found.name, found.nan) == ("x", 1)


def test_the_model_must_be_captured() -> None:
    with pytest.raises(CaptureError, match="not captured yet"):
        qcompiler.find_nonfinite(qcompiler.compile(nn.Linear(64, 64).eval()), rows())


def test_only_a_whole_model_without_a_cache_is_searched() -> None:
    ranks = qcompiler.compile(
        nn.Linear(64, 64).eval(), scheme="int8_row", example_inputs=(rows(),), mesh=qcompiler.simulated_mesh(tp=2),
        sharding="tp{gather=0}",
    )  # fmt: skip
    with pytest.raises(QCompilerError, match=r"a sharded model cannot be searched\. Compile the model without a mesh"):
        qcompiler.find_nonfinite(ranks, rows())
    with pytest.raises(QCompilerError, match="a sharded model cannot be compared with the float model"):
        qcompiler.attribute_error(ranks, rows())
    llm = qcompiler.decoder(llama(), scheme=None, max_batch=1, max_length=32)
    with pytest.raises(InputError, match="a decoder cannot be searched, because its calls depend on its cache"):
        qcompiler.find_nonfinite(llm, torch.ones(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("scheme", ["fp8_tile", "fp8_row", "int8_row", "fp8_tensor{dtype=f8e5m2}", "int8_tensor"])
@pytest.mark.parametrize("odd", [math.nan, -math.inf])
def test_a_weight_that_is_not_finite_is_remarked_on(scheme: str, odd: float) -> None:
    model = seeded(Gated)
    model.up.weight.data[3, 7] = odd  # type: ignore[union-attr, operator]
    fast = qcompiler.compile(model, scheme=scheme, example_inputs=(rows(),))
    counts = "1 NaN and 0 Inf" if math.isnan(odd) else "0 NaN and 1 Inf"
    remarks = {row.module.rpartition(".")[2]: row.remark for row in fast.report.rows}
    assert remarks["up"] == f"up.weight has {counts}, so results are NaN" and not remarks["down"]
    assert bool(fast(rows()).isnan().all())
    found = qcompiler.find_nonfinite(fast, rows())
    assert found is not None and found.op == "core.param"


def test_a_weight_that_is_not_finite_loses_its_own_output_channel() -> None:
    for scheme in ("fp8_tile", "int8_row"):
        model = seeded(lambda: nn.Linear(64, 48))
        clean = qcompiler.compile(model, scheme=scheme, example_inputs=(rows(),))(rows())
        model.weight.data[7, 3] = math.inf  # type: ignore[operator]
        got = qcompiler.compile(model, scheme=scheme, example_inputs=(rows(),))(rows())
        assert got.isnan().all(0).nonzero().flatten().tolist() == [7]
        others = torch.arange(48) != 7
        assert torch.equal(got[:, others], clean[:, others]), scheme
