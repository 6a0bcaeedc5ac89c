"""Quantizations fused in fx graphs after AOTAutograd: equal bits, order, reports; once through Inductor itself."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config
from torch._inductor.decomposition import select_decomp_table
from transformers_models import llama_config, load, saved

from qcompiler import numerics
from qcompiler.inductor import FuseQuantize, FusionReport, fuse
from qcompiler.inductor.fx_export import export_fx
from qcompiler.inductor.fx_import import import_fx
from qcompiler.transformers import QuantizedLinear
from qcompiler.transformers.quantizer import OLDEST

NORM = "bf16(x0 * rsqrt(mean(x0 * x0) + 9.999999974752427e-07) * x1)"
SUM_AND_NORM = "h0 = bf16(x0 + x1); bf16(h0 * rsqrt(mean(h0 * h0) + 9.999999974752427e-07) * x2)"
SILU = "bf16(bf16(x0 / (exp(neg(x0)) + 1.0)) * x1)"
SILU_OF_SUM = "p0 = bf16(y0); bf16(bf16(p0 / (exp(neg(p0)) + 1.0)) * x0)"
RESIDUAL = "bf16(x0 + bf16(y0))"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def quantized(n: int, k: int, scheme: str, prescaled: bool = False) -> QuantizedLinear:
    layer = QuantizedLinear(k, n, False, scheme, prescaled=prescaled, dtype=torch.bfloat16)
    codes, scale = numerics.quantize(torch.randn(n, k) * k**-0.5, layer.w_format)[:2]
    stored: dict[str, Tensor] = {"weight": codes, "weight_scale": scale, "input_prescale": torch.rand(k) + 0.5}
    for name, tensor in layer.stored().items():
        tensor.data.copy_(stored[name])
    return layer


class Block(nn.Module):
    """A layer of a transformer whose attention is a sum over positions."""

    def __init__(self, scheme: str, prescaled: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.RMSNorm(256, eps=1e-6, dtype=torch.bfloat16) for _ in range(2))
        self.v, self.o = (quantized(256, 256, scheme, prescaled) for _ in range(2))
        self.gate, self.up, self.down = (
            quantized(*sizes, scheme, prescaled) for sizes in ((512, 256), (512, 256), (256, 512))
        )

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.o(torch.cumsum(self.v(self.first(x)), 0))
        m = self.second(h)
        return h + self.down(nn.functional.silu(self.gate(m)) * self.up(m))  # type: ignore[no-any-return]


def through_aot(change: Callable[[fx.Graph], Any]) -> Any:
    """A backend that changes the graphs as Inductor would, and then runs their operations one by one."""

    def compile(module: fx.GraphModule, _: Any) -> Any:
        change(module.graph)
        module.recompile()
        return module

    make: Any = aot_autograd  # without types
    return make(fw_compiler=compile, decompositions=select_decomp_table())


def fused(model: Any, *inputs: Tensor) -> tuple[Any, list[FusionReport]]:
    """The result of a compiled model, and the reports."""
    reports: list[FusionReport] = []
    compile: Any = torch.compile  # without types for a function of any arguments
    compiled = compile(
        model, backend=through_aot(lambda graph: reports.append(fuse(graph))), fullgraph=True, dynamic=True
    )
    return compiled(*inputs), reports


def test_norms_and_activations_become_parts_of_quantizations_and_matmuls() -> None:
    model, x = Block("fp8_tile"), torch.randn(5, 256).bfloat16()
    y, (report,) = fused(model, x)
    assert torch.equal(y, model(x)), "fused expressions round where the operations do"
    assert report.fused == {NORM: 1, SUM_AND_NORM: 1}, "gate and up share their input's quantization"
    assert report.epilogues == {SILU_OF_SUM: 1} and report.plain_epilogues == {RESIDUAL: 1}
    assert str(report).splitlines() == [
        "3 of 4 quantizations are fused with the arithmetic before them",
        *(f"  1 x {expression}" for expression in (NORM, SUM_AND_NORM)),
        "  not fused: quantize_1: it is not computed by row arithmetic, but by aten.cumsum",
        "2 of 5 matmuls are fused with what follows them",
        f"  1 x quantize({SILU_OF_SUM})",
        f"  1 x {RESIDUAL}",
        "  not fused: scaled_linear: its users cannot be fused with it: aten.cumsum",
        "  not fused: scaled_linear_1: the arithmetic after it has a residual output",
        "  not fused: scaled_linear_3: its users cannot be fused with it: kernel.fused_linear",
    ]


@pytest.mark.parametrize("scheme", ["fp8_row", "int8_row"])
def test_matmuls_without_a_kernel_for_epilogues(scheme: str) -> None:
    model, x = Block(scheme), torch.randn(5, 256).bfloat16()
    y, (report,) = fused(model, x)
    assert torch.equal(y, model(x))
    assert report.fused == {NORM: 1, SUM_AND_NORM: 1, SILU: 1} and not (report.epilogues or report.plain_epilogues)
    ((why, names),) = report.matmuls.items()
    assert why.startswith("only matmuls of #fp8_tile and #fp8_block") and len(names) == 5


class Halves(nn.Module):
    """Gate and up in one weight, as vLLM stores them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(256, eps=1e-6, dtype=torch.bfloat16)
        self.both, self.down = quantized(1024, 256, "fp8_tile"), quantized(256, 512, "fp8_tile")

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(self.norm(x))
        return self.down(nn.functional.silu(y[..., :512]) * y[..., 512:])  # type: ignore[no-any-return]


def test_the_halves_of_a_merged_matmul() -> None:
    model, x = Halves(), torch.randn(5, 256).bfloat16()
    y, (report,) = fused(model, x)
    assert torch.equal(y, model(x))
    assert report.epilogues == {"p0 = bf16(y0); bf16(bf16(p0 / (exp(neg(p0)) + 1.0)) * bf16(y1))": 1}
    assert report.quantizations == (2, 2)


def test_columns_that_are_not_fixed() -> None:
    layer, x = quantized(256, 256, "fp8_tile"), torch.randn(5, 256).bfloat16()
    y, (report,) = fused(lambda x: nn.functional.relu(layer(x)), x)  # nothing says that x has 256 columns
    assert torch.equal(y, nn.functional.relu(layer(x)))
    assert report.quantizations == (0, 1) and not (report.plain_epilogues or report.matmuls)


def test_factors_of_input_channels_are_fused_too() -> None:
    model, x = Block("fp8_tile", prescaled=True), torch.randn(5, 256).bfloat16()
    y, (report,) = fused(model, x)
    assert torch.equal(y, model(x))
    assert f"{NORM} * x2" in report.fused and f"{SILU_OF_SUM} * x1" in report.epilogues
    assert report.quantizations[0] == 3, "gate and up have different factors, and read one norm"


def test_scales_of_a_whole_tensor_are_not_fused() -> None:
    model, x = Block("fp8_tensor"), torch.randn(5, 256).bfloat16()
    y, (report,) = fused(model, x)
    assert torch.equal(y, model(x))
    assert report.others == {"one scale covers several rows": ("quantize", "quantize_1", "quantize_2", "quantize_4")}


@torch.library.custom_op("qcompiler_tests::remember", mutates_args=("memory",))
def remember(x: Tensor, memory: Tensor) -> Tensor:
    memory.add_(x)
    return memory + x


@remember.register_fake
def _(x: Tensor, memory: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_unknown_operation_stays_where_it_is() -> None:
    """It reads a residual sum and makes an operand of the next: one fused operation cannot be before and after it."""
    layer = quantized(256, 256, "fp8_tile")

    def model(x: Tensor, r: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        h = x + r
        late = remember(h, memory)
        return layer(nn.functional.rms_norm(h + late, (256,)) + memory), h

    x, r = torch.randn(2, 5, 256).bfloat16()
    memories = [torch.ones(5, 256).bfloat16() for _ in range(2)]
    wanted = model(x, r, memories[0])
    found, (report,) = fused(model, x, r, memories[1])
    assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))
    assert torch.equal(*memories) and sum(report.fused.values()) == 1


def test_rows_in_another_arrangement() -> None:
    """The quantization reads a view of rows, as engines that flatten tokens write it."""
    layer = quantized(256, 128, "fp8_tile")

    def model(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = x.reshape(-1, 128) + y
        return layer(nn.functional.silu(h.view(x.shape)) * x), h * 2

    x, y = torch.randn(3, 4, 128).bfloat16(), torch.randn(12, 128).bfloat16()
    found, (report,) = fused(model, x, y)
    assert all(torch.equal(one, other) for one, other in zip(model(x, y), found, strict=True))
    assert sum(report.fused.values()) == 1


def test_a_graph_that_no_pass_changes_stays_as_it_is() -> None:
    texts: list[tuple[str, str]] = []

    def change(graph: fx.Graph) -> None:
        before = str(graph)
        imported = import_fx(graph)
        imported.graph.verify()
        export_fx(imported)
        texts.append((before, str(graph)))

    model, x = Block("int8_row"), torch.randn(5, 256).bfloat16()
    assert torch.equal(torch.compile(model, backend=through_aot(change), dynamic=True)(x), model(x))
    ((before, after),) = texts
    assert before == after


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST,
    reason="it does not quantize models while it loads",
)
def test_a_model_of_transformers(tmp_path: Any) -> None:
    """Its norms and activations become parts of quantizations, and its logits do not change by a bit."""
    model = load(saved(tmp_path, llama_config()), "fp8_tile")
    ids = torch.arange(18).reshape(2, 9)
    logits, (report,) = fused(lambda ids: model(ids, use_cache=False).logits, ids)
    assert torch.equal(logits, model(ids, use_cache=False).logits)
    assert report.quantizations == (3, 4)
    ((why, names),) = report.others.items()
    assert why.startswith("it is not computed by row arithmetic") and len(names) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo.pgo")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # Inductor's own imports
def test_inductor_runs_the_pass() -> None:
    model, x, pass_ = Block("fp8_tile"), torch.randn(5, 256).bfloat16(), FuseQuantize()
    with config.patch(post_grad_custom_post_pass=pass_, force_disable_caches=True):
        y = torch.compile(model, fullgraph=True, dynamic=True)(x)
    assert (y - model(x)).norm() < 0.02 * y.norm(), "Inductor rounds other operations differently"
    (report,) = pass_.reports
    assert report.quantizations == (3, 4) and len(pass_.uuid()) == 64
