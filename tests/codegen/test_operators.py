"""An operation with a GPU kernel is three files: its declaration, its kernel, and its operator with the template.

Each test adds one from outside: the declaration here, the other two files in folders that extend `codegen`'s.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import codegen.torch_ops
from codegen.host import emit_host_module, load_host_module
from codegen.launching.launch import KernelCall
from codegen.machine_code import MachineCode, compile_call
from codegen.operators.operator import OPERATOR_NAMES, OPERATORS
from codegen.targets.hopper import HOPPER
from passes.lowering.to_kernels import ToKernels
from qcompiler import numerics
from qcompiler.dialects.kernel import implement
from qcompiler.dialects.quant import FORMAT
from qcompiler.dialects.state import cache_of
from qcompiler.entry_points import import_modules
from qcompiler.interpreter import interpret
from qcompiler.ir import DType, Effects, Format, Graph, Op, TensorType, Type, op_table, traits
from qcompiler.ir.op_table import OpDef, declare

HEAD = """
from dataclasses import dataclass

from codegen.kernels.{name} import {name}
from codegen.launching.launch import KernelCall, on
from codegen.launching.replay import empty, replayed
from codegen.operators.operator import Operator, declare
from codegen.targets.cuda import gpu_at
from codegen.templates.template import KernelOp, Template
from qcompiler.ir.op_table import lookup


@dataclass(frozen=True)
class Config:
    block: int
    variant = "only"
"""
ROW_SUM = {
    "kernels": """
import triton
import triton.language as tl


@triton.jit
def row_sum(codes, scale, out, columns, scale_stride, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    numbers = tl.load(codes + row * columns + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(numbers) * tl.load(scale + row * scale_stride))
""",
    "operators": HEAD
    + """

class RowSum(Template):
    variant = "only"

    def calls(self, config, operands):
        x, scale, _ = operands
        arguments, constants = (*operands, x.shape[1], scale.stride(0)), {{"BLOCK": config.block}}
        return (KernelCall(row_sum, x.shape[0], arguments, constants, {{"num_warps": 4}}),)


ROW_SUM = KernelOp("sum of rows")
ROW_SUM.add(RowSum, lambda columns: {{Config(1 << (columns - 1).bit_length()): None}})


def launch(x, scale):
    family, out = ROW_SUM.family(gpu_at(x.device)), empty(x.shape[:1], scale.dtype, x.device)
    with on(x.device):
        family.launch(family.choose(x.shape[1]), (x, scale, out))
    return out


declare(Operator(
    "row_sum(Tensor x, Tensor x_scale, int[] x_block) -> Tensor",
    on_cpu=lambda x, scale, block: (x.float() * scale).sum(-1),
    on_gpu=lambda x, scale, block: replayed(launch, ("row_sum",), (x, scale), x, scale),
    fake=lambda x, scale, block: scale.new_empty(x.shape[:1]),
))
""",
}
FORGET = {
    "kernels": """
import triton
import triton.language as tl


@triton.jit
def forget(tensor, slots, count, BLOCK: tl.constexpr):
    start = tensor + tl.load(slots + tl.program_id(0)) * count
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        tl.store(start + place, tl.zeros([BLOCK], tl.float32).to(tensor.dtype.element_ty), mask=place < count)
""",
    "operators": HEAD
    + """

class Forget(Template):
    variant = "only"

    def calls(self, config, operands):
        tensor, slots = operands
        arguments, constants = (tensor, slots, tensor[0].numel()), {{"BLOCK": config.block}}
        return (KernelCall(forget, slots.numel(), arguments, constants, {{"num_warps": 4}}),)


FORGET = KernelOp("forgetting of slots")
FORGET.add(Forget, lambda problem: {{Config(1024): None}})


def launch(cache, slots):
    family = FORGET.family(gpu_at(slots.device))
    with on(slots.device):
        for tensor in cache:
            family.launch(family.choose(None), (tensor, slots))
    return ()


declare(Operator(
    "forget(Tensor(a!)[] cache, Tensor slots) -> ()",
    on_cpu=lookup("state.forget").meaning,
    on_gpu=lambda cache, slots: replayed(launch, ("forget", len(cache)), (*cache, slots), cache, slots),
    fake=lambda cache, slots: None,
    runs="state.forget",
))
""",
}


def row_sum_types(op: Op) -> tuple[Type, ...]:
    return (TensorType(DType.f32, op["x"].tensor.shape[:1]),)


def row_sum(x: Tensor, x_scale: Tensor, *, x_format: Format) -> Tensor:
    return numerics.dequantize(x, x_scale, format=x_format).sum(-1)


def forget_types(op: Op) -> tuple[Type, ...]:
    cache_of(op["cache"])
    return ()


def forget(cache: Sequence[Tensor], slots: Tensor) -> None:
    for tensor in cache:
        tensor[slots] = 0


class Outside:
    """Adds operators whose files are in another folder, until the end of a test."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch

    def add(self, name: str, files: dict[str, str]) -> ModuleType:
        """The module of the operator, after the operators of all folders are registered."""
        for room, text in files.items():
            (self.folder / room).mkdir()
            (self.folder / room / f"{name}.py").write_text(text.format(name=name) if room == "operators" else text)
            package = sys.modules[f"codegen.{room}"]
            self.monkeypatch.setattr(package, "__path__", [*package.__path__, str(self.folder / room)])
        import_modules.cache_clear()
        self.library = codegen.torch_ops.register()
        return sys.modules[f"codegen.operators.{name}"]


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Outside]:
    for module, table in ((op_table, "_TABLE"), (op_table, "_DIALECTS"), (traits, "_KNOWN")):
        monkeypatch.setattr(module, table, getattr(module, table).copy())
    operators, names, modules = dict(OPERATORS), dict(OPERATOR_NAMES), set(sys.modules)
    yield Outside(tmp_path, monkeypatch)
    for added in OPERATORS.keys() - operators.keys():
        del OPERATORS[added]
    for added in OPERATOR_NAMES.keys() - names.keys():
        del OPERATOR_NAMES[added]
    for added in {name for name in sys.modules if name.startswith("codegen.")} - modules:
        del sys.modules[added]
    import_modules.cache_clear()


def code_of(call: KernelCall) -> MachineCode:
    return compile_call(call, HOPPER.gpu, "sm_90a")


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass
class Owner:
    """The `weights` object of a host module."""

    layer: list[Tensor] = field(default_factory=list)


def test_a_kernel_operation(outside: Outside) -> None:
    declare(
        OpDef(
            "quant.row_sum", "Sums rows.", ("x", "x_scale"), {"x_format": FORMAT}, types=row_sum_types, meaning=row_sum
        )
    )
    implement("quant.row_sum", "kernel.row_sum")
    module = outside.add("row_sum", ROW_SUM)
    graph = Graph.parse("""
    func @m(%x: f32[s0, 200]) -> (f32[s0]) {
      %x_q, %x_s = quant.quantize(%x) {format = #fp8_row} : f8e4m3fn[s0, 200], f32[s0, 1]
      %sums = quant.row_sum(%x_q, %x_s) {x_format = #fp8_row} : f32[s0]
      return %sums
    }""")
    x = torch.randn(3, 200)
    want = interpret(graph, [x])
    ToKernels().run(graph)
    graph.verify()
    assert [op.name for op in graph.ops("kernel.row_sum")] == ["kernel.row_sum"]
    host = emit_host_module(graph, "sm_90a")
    assert "sums = kernels.row_sum(x_q, x_s, [1, -1])\n" in host.source
    got = load_host_module(emit_host_module(graph, "cpu"), "<test>")(Owner(), x)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
    family = module.ROW_SUM.family(HOPPER)
    operands = (meta(64, 4096, dtype=torch.float8_e4m3fn), meta(64, 1), meta(64))
    (call,) = family.calls(family.choose(4096), operands)
    code = code_of(call)
    assert call.programs == 64 and code.wide_loads and not code.local_loads


def test_an_operation_that_writes_a_cache(outside: Outside) -> None:
    declare(
        OpDef("state.forget", "Zeros.", ("cache", "slots"), types=forget_types, meaning=forget, effects=Effects.WRITES)
    )
    module = outside.add("forget", FORGET)
    graph = Graph.parse("""
    func @m(%slots: i64[s0]) -> () {
      %cache = state.cache() {name = "layer"} : cache<bf16, slots = 4, heads = 2, capacity = 8, key = 16, value = 16>
      state.forget(%cache, %slots)
      return
    }""")
    graph.verify()
    host = emit_host_module(graph, "cpu")
    assert "1 kernel calls, 0 torch calls" in host.source and "kernels.forget(weights.layer, slots)\n" in host.source
    cache = [torch.ones(4, 2, 8, 16, dtype=torch.bfloat16) for _ in range(2)]
    load_host_module(host, "<test>")(Owner(cache), torch.tensor([0, 3]))
    assert [[row.sum().item() for row in tensor] for tensor in cache] == [[0, 256, 256, 0]] * 2
    family = module.FORGET.family(HOPPER)
    slots = meta(3, dtype=torch.int64)
    (call,) = family.calls(family.choose(None), (meta(4, 8, 8192, 128, dtype=torch.bfloat16), slots))
    assert call.programs == 3 and code_of(call).wide_stores
