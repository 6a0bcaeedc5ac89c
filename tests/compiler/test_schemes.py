"""`qcompiler.compile` with every scheme: all forms of calibration, overrides, and errors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler import Calibration, CodegenError, CompiledModel, Graph, InputError, PassError, QCompilerError
from qcompiler.capture import capture
from qcompiler.program.program import check_kernels
from qcompiler.runtime.device import target_named
from qcompiler.schemes.named import SCHEMES, pipeline


class Block(nn.Module):
    """A norm in front of three linears, of which two read one value, and no norm in front of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48, bias=False), nn.Linear(48, 32)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        y: Tensor = self.down(torch.sigmoid(self.gate(h)) * self.up(h))
        return y if scale is None else y * scale


def data(count: int = 3) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    channels = torch.ones(32).index_fill(0, torch.tensor([3, 17]), 6.0)
    return [torch.randn(2 + i, 5, 32, generator=rng) * channels for i in range(count)]


X = data(1)[0]


@pytest.fixture(scope="module")
def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture(scope="module")
def graph(block: Block) -> Graph:
    """The block as captured, for tests that are not about capture, which takes longest."""
    return capture(block, (X,), {}).graph


def error_of(fast: CompiledModel, block: Block) -> float:
    want = block(X).detach()
    return float((fast(X) - want).norm() / want.norm())


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_compiles_and_is_about_right(block: Block, graph: Graph, name: str) -> None:
    spec = SCHEMES[name].spec
    assert spec is not None
    fast = qcompiler.compile(graph, scheme=name, calibration=data() if spec.needs_calibration else None)
    assert len(fast.report.quantized) == 3 and 1e-4 < error_of(fast, block) < 0.1
    assert torch.equal(fast(X), qcompiler.interpret(fast.graph, [X])[0])
    assert fast.pipeline == pipeline(name)
    assert (fast.calibration is not None) == spec.needs_calibration
    assert fast.graph.calibration is None and fast.settings.calibration is None
    static = [op for op in fast.graph.ops() if op.name == "kernel.quantize_static"]
    assert bool(static) == spec.static
    quantizes = "quant" if spec.x.block[1] == 1 else "kernel"
    assert fast.graph.ops(f"{quantizes}.linear" if quantizes == "quant" else "kernel.scaled_linear")
    assert {op.name.split(".")[0] for op in fast.graph.ops()} <= {"core", "aten", quantizes}


@pytest.mark.parametrize(
    "form",
    [
        lambda batches: batches,
        lambda batches: [(batch,) for batch in batches],
        lambda batches: [{"x": batch} for batch in batches],
        lambda batches: ({"x": batch} for batch in batches),
    ],
    ids=["list", "tuples", "dicts", "generator"],
)
def test_calibration_in_any_form_gives_equal_bits(block: Block, graph: Graph, form: Any) -> None:
    want = qcompiler.compile(graph, scheme="smoothquant_o3", calibration=data())
    fast = qcompiler.compile(block, scheme="smoothquant_o3", calibration=form(data()))  # captured on the first batch
    assert fast.calibration is not None and want.calibration is not None
    assert fast.calibration.digest == want.calibration.digest
    assert torch.equal(fast(X), want(X))


def test_keyword_arguments_in_batches(block: Block) -> None:
    batches = [{"x": x, "scale": torch.tensor(2.0)} for x in data()]
    fast = qcompiler.compile(block, scheme="int8_tensor_static", calibration=batches)
    assert torch.equal(fast(X, scale=torch.tensor(2.0)), 2 * fast(X, scale=torch.tensor(1.0)))


@pytest.mark.parametrize("scheme", ["int8_tensor_static{observer=percentile}", "smoothquant_o3", "fp8_tile_smooth"])
def test_calibration_that_was_saved_gives_equal_bits(block: Block, graph: Graph, scheme: str, tmp_path: Path) -> None:
    first = qcompiler.compile(graph, scheme=scheme, calibration=data())
    assert first.calibration is not None
    first.calibration.save(tmp_path / "calibration")
    loaded = Calibration.load(tmp_path / "calibration")
    digest = loaded.digest
    lazy = qcompiler.compile(block, scheme=scheme, calibration=loaded)
    assert "not captured yet" in repr(lazy)
    eager = qcompiler.compile(graph, scheme=scheme, calibration=loaded)
    for again in (lazy, eager):
        assert torch.equal(again(X), first(X))
        assert again.calibration is not None and again.calibration.digest == digest == loaded.digest


def test_a_calibration_of_another_scheme_lacks_what_this_one_needs(graph: Graph) -> None:
    first = qcompiler.compile(graph, scheme="smoothquant_o3", calibration=data())
    assert first.calibration is not None
    first.calibration.batches = None
    with pytest.raises(
        PassError, match=r"the calibration lacks statistics, and there is no data to compute them from.*histogram"
    ):
        qcompiler.compile(graph, scheme="fp8_tensor_static{observer=mse}", calibration=first.calibration)


def test_a_generator_that_would_have_to_be_read_twice(block: Block, graph: Graph) -> None:
    scheme = "smoothquant_o3{observer=mse}"
    assert error_of(qcompiler.compile(graph, scheme=scheme, calibration=data()), block) < 0.1
    with pytest.raises(InputError) as error:
        qcompiler.compile(block, scheme=scheme, calibration=iter(data()))
    assert str(error.value) == (
        "the calibration batches were an iterator, which has already been consumed (in pass "
        "'calibrate{histogram=true}'). "
        "Pass a list, which can be read again."
    )


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.spec.needs_calibration])  # type: ignore[union-attr]
def test_missing_calibration_is_refused_at_once(block: Block, name: str) -> None:
    for inputs in (None, (X,)):
        with pytest.raises(PassError) as error:
            qcompiler.compile(block, scheme=name, example_inputs=inputs)
        assert str(error.value) == (
            f"the scheme '{name}' needs calibration data, and there is none. "
            "Give some: compile(..., calibration=batches), a list of real calls of the model."
        )
    with pytest.raises(PassError, match="the pipeline needs calibration data, and there is none"):
        qcompiler.compile(block, pipeline=pipeline(name))


def nothing() -> Iterator[Tensor]:
    yield from ()


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "there is no calibration data: got no batches; need at least one batch"),
        (nothing(), "there is no calibration data: got no batches; need at least one batch"),
        (X, "calibration has the wrong type: got Tensor; need an iterable of calls of the model"),
        ({"x": X}, "calibration has the wrong type: got dict; need an iterable of calls of the model"),
        ([X, 3], "a call of the model has the wrong type: got int; need a tensor, a tuple of arguments, or a dict of "
         "arguments by name (in pass 'calibrate', batches[1])"),
        ([X, X[..., :31]], "dimension 2 of x has a different size than at capture: got 31; need 32"),
        ([X, {"y": X}], "the argument 'y' was not given at capture"),
        ([X, X.half()], "x has a different dtype than at capture: got torch.float16; need torch.float32"),
        ([X, X * torch.nan], "calibration found numbers in %layer_norm that are not finite: got 320 NaN and 0 Inf in "
         "batches[1]; need finite numbers"),
        ([X * 0], "calibration saw only zeros or no rows in %"),
        ([X[:0]], "calibration saw only zeros or no rows in %layer_norm: got no row in 1 batch"),
    ],
)  # fmt: skip
def test_calibration_data_that_will_not_do(block: Block, calibration: Any, message: str) -> None:
    if message == "calibration saw only zeros or no rows in %":  # a norm of zeros is its bias
        block = Block().eval()
        nn.init.zeros_(block.norm.bias)
    with pytest.raises(InputError) as error:
        qcompiler.compile(block, scheme="int8_tensor_static", calibration=calibration)
    assert str(error.value).startswith(message)
    if isinstance(calibration, list) and len(calibration) == 2:
        assert "batches[1]" in str(error.value) and "pass 'calibrate'" in str(error.value)


# Overrides


def kinds(fast: CompiledModel) -> dict[str, str]:
    """Module -> the format and the granularity of its weight."""
    rows = {}
    for op in fast.graph.ops("kernel.scaled_linear"):
        rows[op.loc.module] = f"{op.format('x_format').block} {op.format('w_format')}"
    return rows


def test_overrides(block: Block, graph: Graph) -> None:
    overrides = {"*": "fp8_row", "gate": None, "down.weight": "int8_tensor{w=channel}"}
    fast = qcompiler.compile(graph, overrides=overrides)
    assert kinds(fast) == {"up": "(1, -1) #fp8_row", "down": "(-1, -1) #int8_row"}
    assert {row.module: row.reason for row in fast.report.skipped} == {"gate": "the pattern '!gate' excludes it"}
    assert 1e-4 < error_of(fast, block) < 0.1


def test_overrides_where_one_value_is_read_by_several_schemes(block: Block, graph: Graph) -> None:
    for layer, other in (("gate", "up"), ("up", "gate")):
        static = qcompiler.compile(
            graph,
            scheme="int8_tensor_static",
            calibration=data(),
            overrides={layer: "int8_tensor_static{w=channel}", "down": "smoothquant_o3{observer=mse}"},
        )
        assert kinds(static)[layer] == "(-1, -1) #int8_row" and kinds(static)[other] == "(-1, -1) #int8_tensor"
        assert len(static.graph.ops("kernel.quantize_static")) == 2  # one for the two that agree on their input
        assert error_of(static, block) < 0.1


def test_left_out_readers_of_a_smoothed_value_multiply_weights_that_were_scaled_once(
    block: Block, graph: Graph
) -> None:
    fast = qcompiler.compile(graph, scheme="smoothquant_o1", calibration=data(), overrides={"up": None})
    names = {str(op.attrs["name"]) for op in fast.graph.ops("core.param")}
    assert {"norm.weight_folded", "norm.bias_folded", "up.weight_folded"} <= names
    computed = [op for op in fast.graph.ops() if op.results and op.name != "core.param"]
    assert not [op for op in computed if fast.graph.is_constant(op.results[0])]
    mixed = qcompiler.compile(
        graph, scheme="smoothquant_o1", calibration=data(), overrides={"up": None, "gate": "int8_row", "down": None}
    )
    assert len(mixed.report.quantized) == 1 and error_of(mixed, block) < 0.1


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"overrides": {"gaet": None}}, "a pattern matches no matmul's weight: got 'gaet' (in pass 'merge-linears{la"
         'yers=["*", "!gaet"]}\'). Did you mean \'gate\'? Known: gate, gate.bias, gate.weight and 5 more.'),
        ({"overrides": {"layers.*": "fp8_row"}}, "a pattern matches no matmul's weight: got 'layers.*' (in pass"),
        ({"overrides": {"up": "fp8_rov"}}, "no such scheme: got 'fp8_rov'. Did you mean 'fp8_row'?"),
        ({"overrides": {"*": None}}, "nothing was quantized: got the pipeline 'canonicalize; attention; dead-code; "),
        ({"overrides": {"up": "int8_tensor_static"}}, "the scheme 'int8_tensor_static' needs calibration data"),
        ({"overrides": {}, "pipeline": "fp8-tile"}, "both overrides and a pipeline are given: got {}; need one of "
         'them. Put them into the pipeline: qcompiler.pipeline("fp8_tile", overrides).'),
        ({"scheme": "fp8_row{k_block=64}"}, "scheme 'fp8_row' has no such option: got 'k_block'."),
        ({"overrides": ["up"]}, "overrides has the wrong type: got list"),
    ],
)  # fmt: skip
def test_what_is_refused(graph: Graph, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(QCompilerError) as error:
        qcompiler.compile(graph, **keywords)
    assert str(error.value).startswith(message)


# What a GPU can run, asked without one

GPU = target_named("sm_90a")


@pytest.mark.parametrize("name", SCHEMES)
def test_which_schemes_have_kernels(name: str) -> None:
    steps = pipeline(name)
    check_kernels(steps, target_named("cpu"))
    if "channel_reference" not in name:
        check_kernels(steps, GPU)
        return
    with pytest.raises(CodegenError) as error:
        check_kernels(steps, GPU)
    assert str(error.value).startswith(
        f"no kernel of the target sm_90a supports the formats of pass '{steps['quantize']}'"
    )
    assert "varies along K" in str(error.value)
    assert str(error.value).endswith(
        'Choose another scheme, or compile the model on the CPU with target="cpu", which simulates it.'
    )


@pytest.mark.parametrize(
    ("scheme", "why"),
    [
        ("fp8_row{dtype=f8e5m2}", "the kernels multiply f8e4m3fn or i8, not f8e5m2"),
        ("fp8_tile{k_block=16}", "with a weight in [128, 128] blocks, x needs [1, b] with b in 32, 64, 128, 256, 512"),
        ("fp8_tile{k_block=-1}", None),
        ("fp8_tensor{w=block}", None),
        ("int8_tensor{w=block}", "INT8 sums are scaled once, at their end"),
    ],
)
def test_which_options_have_kernels(scheme: str, why: str | None) -> None:
    for steps in (pipeline(scheme), pipeline("fp8_tile", {"a": scheme})):
        if why is None:
            check_kernels(steps, GPU)
            continue
        with pytest.raises(CodegenError) as error:
            check_kernels(steps, GPU)
        assert why in str(error.value)
