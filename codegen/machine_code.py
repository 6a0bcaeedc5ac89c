"""Compiles a kernel to machine code without a GPU or driver, and extracts metrics from it.

Triton includes ptxas, cuobjdump and nvdisasm.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.jit import JITFunction

from codegen.compile_options import compile_options
from codegen.kernel_cache import use_cache_folder
from codegen.launching.launch import KernelCall
from qcompiler.errors import CodegenError

TRITON_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5", torch.int8: "i8", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip
"""Element types as written in signatures; a pointer has a * in front."""

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", re.MULTILINE)


@dataclass(frozen=True)
class MachineCode:
    """Metrics of one compiled kernel.

    Attributes:
        qgmma: FP8 tensor-core instructions (`QGMMA`), static count.
        igmma: INT8 tensor-core instructions (`IGMMA`).
        tma_loads: Loads through the copy engine (`UTMALDG`).
        tma_stores: Stores through the copy engine (`UTMASTG`).
        local_loads: Loads from local memory, i.e. spilled registers (`LDL`).
        local_stores: Stores to local memory (`STL`).
        wide_loads: Global loads of 16 bytes per thread, asynchronous ones included.
        wide_stores: Global stores of 16 bytes per thread.
        float_adds: FP32 additions and multiply-adds (`FADD`, `FFMA`).
        registers: Registers per thread at launch; specialized warps reallocate them afterwards.
        shared_memory: Bytes of shared memory per block.
        warps: Warps per block.
        instructions: Machine instructions.
        sass: The disassembly.
    """

    qgmma: int
    igmma: int
    tma_loads: int
    tma_stores: int
    local_loads: int
    local_stores: int
    wide_loads: int
    wide_stores: int
    float_adds: int
    registers: int
    shared_memory: int
    warps: int
    instructions: int
    sass: str


def compile_call(call: KernelCall, gpu: GPUTarget, target: str) -> MachineCode:
    """Compiles the kernel of a call as a launch would: for its types, alignment, and divisibility by 16.

    Args:
        call: Its operands may be without data, on the device "meta".
        gpu: The GPU that Triton compiles for.
        target: The target's name in messages.

    Raises:
        CodegenError: Triton rejects the kernel.
    """
    kernel: JITFunction[Any] = call.kernel
    names = list(kernel.arg_names)
    signature: dict[str, str] = {}
    constants = dict(zip(names[len(call.arguments) :], call.constants.values(), strict=True))
    divisible = []
    for parameter, value in zip(kernel.params, call.arguments, strict=False):
        kind, by_16 = _specialized(value, not parameter.do_not_specialize)
        if kind is None:
            constants[parameter.name] = value
        else:
            signature[parameter.name] = kind
        if by_16:
            divisible.append(parameter.name)
    language = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = language(
        kernel,
        {name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    try:
        use_cache_folder()
        return compile_source(source, gpu, compile_options(call.options))
    except CodegenError:
        raise
    except Exception as error:  # Triton's errors have no common base class
        raise CodegenError(f"Triton cannot compile {kernel.__name__} for {target}", got=error) from error


def compile_source(source: ASTSource, gpu: GPUTarget, options: dict[str, Any]) -> MachineCode:
    """Compiles and disassembles a kernel; raises Triton's own errors. Tests replace this function by a cache."""
    built = triton.compile(source, target=gpu, options=options)
    return _inspect(built.asm["cubin"], built.metadata.shared, built.metadata.num_warps)


def _specialized(value: Any, specialized: bool) -> tuple[str | None, bool]:
    """Triton's type of an argument (None if its value is compiled in), and whether it is a multiple of 16."""
    if value is None:
        return None, False
    if isinstance(value, int):
        if specialized and value == 1:
            return None, False
        return "i32", specialized and value % 16 == 0
    if isinstance(value, Tensor):
        return f"*{TRITON_TYPES[value.dtype]}", value.data_ptr() % 16 == 0
    layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
    return f"tensordesc<{TRITON_TYPES[value.base.dtype]}{list(value.block_shape)}{layout}>", False


def _inspect(cubin: bytes, shared_memory: int, warps: int) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        sass = _cuobjdump(path, "-sass", "-res-usage")
    names = _INSTRUCTION.findall(sass)
    heads = Counter(name.split(".")[0] for name in names)
    registers = re.search(r"REG:(\d+)", sass)
    return MachineCode(
        qgmma=heads["QGMMA"],
        igmma=heads["IGMMA"],
        tma_loads=heads["UTMALDG"],
        tma_stores=heads["UTMASTG"],
        local_loads=heads["LDL"],
        local_stores=heads["STL"],
        wide_loads=sum(name.startswith(("LDG", "LDGSTS")) and ".128" in name for name in names),
        wide_stores=sum(name.startswith("STG") and ".128" in name for name in names),
        float_adds=heads["FADD"] + heads["FFMA"],
        registers=int(registers[1]) if registers else 0,
        shared_memory=shared_memory,
        warps=warps,
        instructions=len(names),
        sass=sass,
    )


def disassembly(cubin: Path) -> str:
    """The instructions of a compiled kernel, with their addresses; raises CodegenError for an invalid file."""
    return _cuobjdump(cubin, "-sass")


def _cuobjdump(cubin: Path, *options: str) -> str:
    done = subprocess.run([_tool(), *options, str(cubin)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CodegenError("cuobjdump cannot read the compiled kernel", got=done.stderr.strip())
    return done.stdout


@cache
def _tool() -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not path.exists():
        raise CodegenError("this Triton has no cuobjdump", got=f"triton {triton.__version__}", need=path)
    return str(path)
