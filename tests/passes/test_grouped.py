"""Mixtures of experts through the compiler: which grouped GEMMs are quantized, how, and why others are not."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import qcompiler
from codegen.host import emit_host_module
from passes.cleanup.fold_constants import FoldConstants
from passes.lowering.to_kernels import ToKernels
from passes.quantizing.fp8_tile import Fp8Tile
from passes.quantizing.quantize import Quantize
from passes.quantizing.share_quantize import ShareQuantize
from qcompiler import numerics
from qcompiler.dialects.grouped import grouped_linear
from qcompiler.interpreter import interpret
from qcompiler.ir import DType, Format, Graph
from qcompiler.pass_manager.instruments import CheckChanged, Validate
from qcompiler.pass_manager.pipeline import Pass, Pipeline
from qcompiler.pass_manager.runner import run_pipeline
from qcompiler.testing import assert_text

# transformers compiles some losses with torch.jit.script on import, which is deprecated on newer Pythons.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")

ONE = """
func @experts(%x: {x}[s0, {k}], %offsets: i32[4]) -> ({x}[s0, {n}]) where s0 in 0.. {{
  %w = core.param() {{name = "experts.w"}} : {x}[4, {k}, {n}]
  %y = aten._grouped_mm(%x, %w, %offsets{bias}) : {x}[s0, {n}]
  return %y
}}
"""

E5M2, NARROW = Format(DType.f8e5m2, (1, 128)), Format(DType.f8e4m3fn, (1, 64))


def one(x: str = "bf16", k: int = 144, n: int = 24, bias: str = "") -> Graph:
    graph = Graph.parse(ONE.format(x=x, k=k, n=n, bias=bias))
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}[x]
    graph.weights = {"experts.w": torch.randn(4, k, n, generator=torch.Generator().manual_seed(1)).to(dtype)}
    return graph


def test_a_grouped_gemm_is_quantized_fused_and_lowered_to_its_kernel() -> None:
    graph = one()
    w, x = graph.weights["experts.w"], torch.randn(9, 144, dtype=torch.bfloat16)
    offsets = torch.tensor([2, 2, 7, 9], dtype=torch.int32)
    steps: tuple[Pass, ...] = (Fp8Tile(), ShareQuantize(), FoldConstants(), ToKernels())
    run_pipeline(Pipeline(steps), graph, instruments=[Validate(), CheckChanged()], inputs=[x, offsets])
    assert_text(
        graph,
        """
        func @experts(%x: bf16[s0, 144], %offsets: i32[4]) -> (bf16[s0, 24]) where s0 in 0.. {
          %x_q, %x_s = kernel.quantize(%x) {format = #fp8_tile<scale_layout = "col_major">} : f8e4m3fn[s0, 144], f32[s0, 2]
          %experts.w_q = core.param() {name = "experts.w_q"} : f8e4m3fn[4, 24, 144]
          %experts.w_s = core.param() {name = "experts.w_s"} : f32[4, 1, 2]
          %y = kernel.grouped_linear(%x_q, %x_s, %experts.w_q, %experts.w_s, %offsets) {out_dtype = bf16, w_format = #fp8_block, x_format = #fp8_tile<scale_layout = "col_major">} : bf16[s0, 24]
          return %y
        }
        """,  # noqa: E501
    )
    assert graph.weights["experts.w_q"].is_contiguous(), "the tensor cores need K as the last dimension"
    (got,) = interpret(graph, [x, offsets])
    x_q, x_s = numerics.quantize(x)
    w_q, w_s = numerics.quantize(w.transpose(1, 2), numerics.format_of((128, 128)))
    assert torch.equal(got, grouped_linear(x_q, x_s, w_q, w_s, offsets))


@pytest.mark.parametrize(
    ("graph", "step", "reason"),
    [
        (one(), Quantize(), "supports only #fp8_tile and #fp8_block, the scheme has"),
        (one(), Fp8Tile(E5M2), "the scheme has #format<f8e5m2, block = [1, 128]> and #fp8_block"),
        (one(), Fp8Tile(NARROW), "the scheme has #format<f8e4m3fn, block = [1, 64]> and #fp8_block"),
        (one(), Fp8Tile(layers=("!experts.w",)), "the pattern '!experts.w' excludes it"),
        (one(k=24), Fp8Tile(), "the grouped kernels need K to be a multiple of 16, got 24 (%w)"),
        (one(n=20), Fp8Tile(), "need output rows of a multiple of 16 bytes, got 20 of bf16 (%w)"),
        (one("f64"), Fp8Tile(), "it computes f64 from f64 and f64, not f32, f16 or bf16"),
        (one(bias=", 1.0"), Fp8Tile(), "it also adds a bias"),
    ],
)
def test_reasons_for_skipping(graph: Graph, step: Pass, reason: str) -> None:
    before = str(graph)
    assert not step.run(graph) and str(graph) == before
    assert reason in step.explain(graph)["y"]


OPERANDS = """
func @m(%x: f32[6, 32], %xs: f32[3, 2, 32], %v: f32[3, 32, 16], %offsets: i32[3], %long: i64[3]) -> (f32[6, 16]) {{
  %w = core.param() {{name = "w"}} : f32[3, 32, 16]
  %y = aten._grouped_mm({args}) : f32[6, 16]
  return %y
}}
"""


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ("%x, %v, %offsets", "both of its operands are computed from the inputs"),
        ("%w, %v, %offsets", "its weights are computed from the inputs (%v)"),
        ("%w, %w, %offsets", "both of its operands are constant (%w)"),
        ("%xs, %w", "its groups are not groups of rows of one activation (%xs)"),
        ("%x, %w, %long", "its offsets are not one i32 per matrix (%long)"),
    ],
)
def test_only_rows_of_an_activation_times_constant_matrices_are_quantized(args: str, reason: str) -> None:
    graph = Graph.parse(OPERANDS.format(args=args))
    assert not Fp8Tile().run(graph)
    assert Fp8Tile().explain(graph) == {"y": reason}


class Experts(torch.nn.Module):
    """A mixture of experts on torch's grouped GEMM: a router, two projections, rows sorted by expert."""

    def __init__(self, experts: int = 8, hidden: int = 256, inner: int = 384) -> None:
        super().__init__()
        self.router = torch.nn.Linear(hidden, experts, bias=False)
        self.up = torch.nn.Parameter(torch.randn(experts, hidden, inner) / hidden**0.5)  # [E, K, N]
        self.down = torch.nn.Parameter(torch.randn(experts, hidden, inner) / inner**0.5)  # [E, N, K]

    def forward(self, x: Tensor) -> Tensor:
        chosen, which = self.router(x).softmax(-1).topk(2)
        order = which.flatten().argsort(stable=True)
        counts = torch.nn.functional.one_hot(which.flatten(), len(self.up)).sum(0)
        offsets = counts.cumsum(0).to(torch.int32)
        inner = torch.nn.functional.silu(torch._grouped_mm(x[order // 2], self.up, offs=offsets))
        out = torch._grouped_mm(inner, self.down.transpose(-2, -1), offs=offsets)
        back = torch.empty_like(out).index_copy(0, order, out)
        result: Tensor = (back.view(-1, 2, x.shape[-1]) * chosen[..., None]).sum(1)
        return result


def test_a_mixture_of_experts_is_compiled_for_any_number_of_tokens() -> None:
    torch.manual_seed(0)
    model = Experts().to(torch.bfloat16).eval()
    fast = qcompiler.compile(model, example_inputs=(torch.randn(6, 256, dtype=torch.bfloat16),), scheme="fp8_tile")
    rows = {row.module or row.weights[0]: row for row in fast.report.rows if row.is_matmul}
    assert {name: row.quantized for name, row in rows.items()} == {"router": False, "up": True, "down": True}
    assert rows["router"].reason.startswith("it is a router")
    assert fast.source.count("kernels.grouped_linear(") == 2
    shapes = {str(op.attrs["name"]): str(op.result.type) for op in fast.graph.ops("core.param")}
    assert shapes["up_q"] == "f8e4m3fn[8, 384, 256]" and shapes["down_q"] == "f8e4m3fn[8, 256, 384]"
    for tokens in (6, 1, 40):
        x = torch.randn(tokens, 256, dtype=torch.bfloat16)
        with torch.no_grad():
            want = model(x).float()
        assert float((fast(x).float() - want).norm() / want.norm()) < 0.06


@pytest.mark.parametrize(
    ("name", "options", "implementation", "dtype"),
    [
        # The loop over experts depends on data and is captured as a grouped GEMM, too.
        ("Mixtral", {"num_local_experts": 4}, "eager", torch.float32),
        (
            "Qwen2Moe",
            {"num_experts": 4, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128},
            "grouped_mm",
            torch.bfloat16,
        ),
    ],
)
def test_the_experts_of_hugging_face_models_are_quantized(
    name: str, options: dict[str, int], implementation: str, dtype: torch.dtype
) -> None:
    transformers = pytest.importorskip("transformers")
    size = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 96, "num_experts_per_tok": 2, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**size, **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().to(dtype)
    model.set_experts_implementation(implementation)
    fast = qcompiler.compile(model, example_kwargs={"input_ids": torch.randint(3, 96, (2, 7))}, scheme="fp8_tile")
    experts = [row for row in fast.report.rows if row.module.endswith("experts") and row.is_matmul]
    assert [row.quantized for row in experts] == [True, True]
    assert all(row.reason for row in fast.report.skipped)
    for batch, length in ((2, 7), (1, 1), (3, 20)):
        ids = torch.randint(3, 96, (batch, length))
        with torch.no_grad():
            want = model(input_ids=ids, use_cache=False).logits.float()
        assert float((fast(input_ids=ids).logits.float() - want).norm() / want.norm()) < 0.2


BATCH = """
func @m(%x: {x}[4, {t}, 144], %y: {x}[4, 8, 144]) -> ({x}[4, {t}, 32]){where} {{
  %w = core.param() {{name = "experts.w"}} : {x}[4, 144, 32]
  %z = {op}({args}) : {x}[4, {t}, 32]
  return %z
}}
"""


def batch(op: str = "aten.bmm", t: str = "s0", args: str = "%x, %w", x: str = "bf16") -> Graph:
    where = " where s0 in 0.." if t == "s0" else ""
    graph = Graph.parse(BATCH.format(op=op, t=t, args=args, x=x, where=where))
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}[x]
    graph.weights = {"experts.w": torch.randn(4, 144, 32, generator=torch.Generator().manual_seed(1)).to(dtype)}
    return graph


@pytest.mark.parametrize("op", ["aten.bmm", "aten.matmul"])
@pytest.mark.parametrize(("t", "rows"), [("s0", 5), ("s0", 1), ("s0", 0), ("3", 3)])
def test_batched_matmuls_are_groups_of_equal_size(op: str, t: str, rows: int) -> None:
    graph = batch(op, t)
    w, x = graph.weights["experts.w"], torch.randn(4, rows, 144).to(torch.bfloat16)
    other = torch.zeros(4, 8, 144, dtype=torch.bfloat16)
    steps: tuple[Pass, ...] = (Fp8Tile(), ShareQuantize(), FoldConstants(), ToKernels())
    run_pipeline(Pipeline(steps), graph, instruments=[CheckChanged()], inputs=[x, other])
    assert [op.name for op in graph.ops() if op.name.startswith("kernel")] == [
        "kernel.quantize",
        "kernel.grouped_linear",
    ]
    assert graph.weights["experts.w_q"].shape == (4, 32, 144)
    (got,) = interpret(graph, [x, other])
    x_q, w_q = (
        numerics.quantize(x, numerics.format_of((1, 128))),
        numerics.quantize(w.transpose(1, 2), numerics.format_of((128, 128))),
    )
    for group in range(4):
        operands = (x_q[0][group], x_q[1][group], w_q[0][group], w_q[1][group])
        want = numerics.scaled_linear(*operands, out_dtype=torch.bfloat16)
        assert torch.equal(got[group], want)


@pytest.mark.parametrize(
    ("graph", "step", "reason"),
    [
        (batch(), Quantize(), "a grouped matmul supports only #fp8_tile and #fp8_block"),
        (batch(), Fp8Tile(layers=("!experts.w",)), "the pattern '!experts.w' excludes it"),
        (batch(x="f64"), Fp8Tile(), "it computes f64 from f64 and f64, not f32, f16 or bf16"),
        (batch(t="144", args="%w, %y"), Fp8Tile(), "it multiplies by a batch of matrices (a weight of 3 dimensions)"),
    ],
)
def test_reasons_for_skipping_a_batched_matmul(graph: Graph, step: Pass, reason: str) -> None:
    before = str(graph)
    assert not step.run(graph) and str(graph) == before
    assert step.explain(graph)["z"].startswith(reason)


@pytest.mark.slow
def test_the_experts_of_llama_4_are_quantized() -> None:
    config = transformers.Llama4TextConfig(
        hidden_size=128, intermediate_size=128, intermediate_size_mlp=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=96, num_local_experts=4, num_experts_per_tok=1, pad_token_id=0,
        interleave_moe_layer_step=1, attention_chunk_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    kind: Any = transformers.Llama4ForCausalLM  # without types
    model = kind._from_config(config, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    fast = qcompiler.compile(model, example_inputs=(torch.arange(3, 15).reshape(2, 6),))
    experts = [row for row in fast.report.rows if row.module.endswith("experts") and row.is_matmul]
    assert [row.format for row in experts] == ["fp8_tile", "fp8_tile"]
    assert emit_host_module(fast.graph, "sm_90a").source.count("kernels.grouped_linear(") == 2
    # `test_batched_matmuls_are_groups_of_equal_size` checks the numbers; here, another batch and length.
    assert fast(torch.arange(4, 18).reshape(1, 14)).logits.isfinite().all()
