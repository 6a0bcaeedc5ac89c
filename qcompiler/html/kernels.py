"""The kernel calls of a compiled graph, equal calls grouped, with the configurations for some numbers of rows.

32 x kernel.scaled_linear  N 6144  K 4096      16 rows: narrow 16x128x128 ...      4096 rows: warp 256x128x128 ...
"""

from typing import Any

from codegen.epilogues import handed_over
from codegen.support import is_tiled
from codegen.targets.cuda import CudaTarget
from codegen.templates.fused import FUSED_GEMM, FusedGemmProblem, Separate, why_separate
from codegen.templates.gemm import GEMM, GemmProblem, Kind
from passes.fusing.fuse_epilogue import takes_expression
from qcompiler.dialects.fused_expression import parse
from qcompiler.dialects.kernel import is_fused, parts_of
from qcompiler.errors import CodegenError
from qcompiler.ir import DType, Graph, Op, Role, Value, print_argument
from qcompiler.runtime.device import Target

ROWS = (1, 16, 128, 1024, 8192)
"""Numbers of rows for which configurations are shown: decode, small batches, prefill."""


def describe_kernels(graph: Graph, target: Target) -> dict[str, Any]:
    """Returns one row for each distinct kernel call, with the names of the values that such calls compute.

    Only a GPU target has configurations to choose from; `rows` is empty for others.
    """
    gpu = target if isinstance(target, CudaTarget) else None
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for op in graph.ops():
        if not op.name.startswith("kernel."):
            continue
        operands = tuple(print_argument(None) if arg is None else _type(arg) for arg in op.args)
        key = (op.name, operands, tuple((name, print_argument(op.attrs[name])) for name in sorted(op.attrs)))
        row = rows.setdefault(key, {})
        if not row:
            row |= {"op": op.name, "operands": operands, "attrs": key[2], "values": [], "choices": _choices(op, gpu)}
            row["result"] = _type(op.results[0])
        row["values"].append(op.results[0].name)
    gpu_name = gpu and f"{gpu.generation} GPU with {gpu.limits.multiprocessors} multiprocessors"
    return {"rows": ROWS if gpu else (), "gpu": gpu_name, "kinds": list(rows.values())}


def _type(arg: Any) -> str:
    return str(arg.type) if isinstance(arg, Value) else print_argument(arg)


def _choices(op: Op, gpu: CudaTarget | None) -> list[str]:
    """Returns the configuration for each of `ROWS`, or why there is none; empty if the op is not a matmul."""
    if gpu is None or op.role is not Role.QUANTIZED_MATMUL or op.get("offsets") is not None:
        return []
    return [_choice(op, rows, gpu) for rows in ROWS]


def _choice(op: Op, rows: int, gpu: CudaTarget) -> str:
    why = gpu.why_not(op.format("x_format"), op.format("w_format"))
    if why is not None:
        return f"no kernel: {why}"
    try:
        if is_fused(op):
            return _fused(op, rows, gpu)
        return str(GEMM.family(gpu).choose(_problem(op, rows, _out_bytes(op), gpu)))
    except CodegenError as error:
        return f"no kernel: {error}"


def _problem(op: Op, rows: int, out_bytes: int, gpu: CudaTarget) -> GemmProblem:
    """Returns the GEMM problem alone, with aligned operands."""
    n, k = (int(str(size)) for size in op["w"].tensor.shape)
    x, w = op.format("x_format"), op.format("w_format")
    kind: Kind = "tiles" if is_tiled(w.block) else "rows_i8" if w.element is DType.i8 else "rows_f8"
    columns = x.scale_layout == "col_major"
    sizes = (rows, n, k, gpu.limits.multiprocessors, out_bytes)
    return GemmProblem(*sizes, kind=kind, x_block=x.block[1], scale_columns=columns)


def _fused(op: Op, rows: int, gpu: CudaTarget) -> str:
    """Describes one kernel with a fused epilogue, or the GEMM alone and the reason."""
    expression = str(op.attrs["expression"])
    handed, _ = handed_over(expression)
    gemm, family = _problem(op, rows, handed.itemsize, gpu), FUSED_GEMM.family(gpu)
    alone = GEMM.family(gpu).choose(gemm)
    if not takes_expression(op.format("x_format"), op.format("w_format")):
        why = "the fused kernel multiplies FP8 tiles [1, 128] by blocks [128, 128]"
        return f"{alone}, then the fused expression: {why}"
    parts, block = parts_of(op), op.format().block if "format" in op.attrs else None
    sizes = (rows, gemm.n // parts, gemm.k, parts, handed.itemsize, parse(expression).dtype().itemsize)
    facts = (len(op.rest), op.get("bias") is not None, block)
    problem = FusedGemmProblem(*sizes, *facts, gemm.sms, scale_columns=gemm.scale_columns)
    found = family.choose(problem)
    if isinstance(found, Separate):
        return f"{alone}, then the fused expression: {why_separate(family, problem)}"
    return f"fused: {found}"


def _out_bytes(op: Op) -> int:
    return op.results[0].tensor.dtype.bits // 8
