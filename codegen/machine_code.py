"""Machine code of a kernel, made on a machine without a GPU or a driver, and what can be read off it.

Triton brings ptxas, cuobjdump and nvdisasm.
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
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.jit import JITFunction

from codegen.compile_options import compile_options
from codegen.kernel_cache import use_cache_folder
from qcompiler.errors import CodegenError

HOPPER = GPUTarget("cuda", 90, 32)

TRITON_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5", torch.int8: "i8", torch.int32: "i32",
}  # fmt: skip
"""Element types as signatures spell them; a pointer has a * in front."""

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", re.MULTILINE)


@dataclass(frozen=True)
class MachineCode:
    """What one compiled kernel is made of.

    Attributes:
        qgmma: FP8 tensor-core instructions (`QGMMA`), statically.
        igmma: INT8 tensor-core instructions (`IGMMA`).
        tma_loads: Loads through the copy engine (`UTMALDG`).
        tma_stores: Stores through the copy engine (`UTMASTG`).
        local_loads: Loads from local memory, i.e. spilled registers (`LDL`).
        local_stores: Stores to local memory (`STL`).
        wide_loads: Global loads of 16 bytes a thread, asynchronous ones included.
        wide_stores: Global stores of 16 bytes a thread.
        float_adds: FP32 additions and multiply-adds (`FADD`, `FFMA`).
        registers: Registers of a thread; of one at the start, where specialized warps then trade them.
        shared_memory: Bytes of shared memory of a block.
        warps: Warps of a block.
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

    @property
    def blocks(self) -> int:
        """How many blocks a Hopper multiprocessor holds at one time.

        It has 65536 registers, given to a warp by the 256, room for 64 warps and 32 blocks, and 228 KB of shared
        memory, of which a block takes 1 KB more than it asks for.
        """
        by_registers = 65536 // (-(-self.registers * 32 // 256) * 256 * self.warps)
        return min(32, 64 // self.warps, by_registers, 228 * 1024 // (self.shared_memory + 1024))


def compile_kernel(
    kernel: JITFunction[Any],
    types: dict[str, str],
    constants: dict[str, Any],
    divisible: tuple[str, ...],
    options: dict[str, int],
) -> MachineCode:
    """Compiles a kernel for sm_90a.

    Args:
        kernel: A function of `codegen.kernels`, in Triton or Gluon.
        types: Triton's types of its arguments; those without one are 32-bit integers.
        constants: Arguments that the compiler knows.
        divisible: Arguments that are multiples of 16.
        options: `num_warps`, `num_stages`; what of them the language has.

    Raises:
        CodegenError: Triton rejects the kernel.
    """
    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    language = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = language(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    try:
        use_cache_folder()
        built = triton.compile(source, target=HOPPER, options=compile_options(options))
    except Exception as error:  # Triton's own errors have no common base
        raise CodegenError(f"Triton cannot compile {kernel.__name__} for sm_90a", got=error) from error
    return _inspect(built.asm["cubin"], built.metadata.shared, built.metadata.num_warps)


def _inspect(cubin: bytes, shared_memory: int, warps: int) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        sass, usage = disassembly(path), _cuobjdump("-res-usage", path)
    names = _INSTRUCTION.findall(sass)
    heads = Counter(name.split(".")[0] for name in names)
    registers = re.search(r"REG:(\d+)", usage)
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
    """The instructions of a compiled kernel, with their addresses; CodegenError when the file is none."""
    return _cuobjdump("-sass", cubin)


def _cuobjdump(option: str, cubin: Path) -> str:
    done = subprocess.run([_tool(), option, str(cubin)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CodegenError("cuobjdump cannot read the compiled kernel", got=done.stderr.strip())
    return done.stdout


@cache
def _tool() -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not path.exists():
        raise CodegenError("this Triton has no cuobjdump", got=f"triton {triton.__version__}", need=path)
    return str(path)
