"""Compiles the kernels for Hopper on a machine without a GPU or a driver, and reads the machine code.

Triton brings ptxas, cuobjdump and nvdisasm. What they show, the tests hold: the tensor cores' FP8 instruction is there,
tiles come through the copy engine, and no register lives in local memory.
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
from triton.runtime.jit import JITFunction

from codegen.kernel_cache import use_cache_folder
from codegen.kernels.quantize import quantize_rows
from codegen.kernels.scaled_gemm import scaled_gemm_pointers, scaled_gemm_tma
from codegen.tiling import GemmConfig, QuantizeConfig, quantize_config
from qcompiler import numerics
from qcompiler.errors import CodegenError

HOPPER = GPUTarget("cuda", 90, 32)

_TRITON_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", re.MULTILINE)


@dataclass(frozen=True)
class MachineCode:
    """What one compiled kernel is made of.

    Attributes:
        qgmma: FP8 tensor-core instructions (`QGMMA`), statically.
        tma_loads: Loads through the copy engine (`UTMALDG`).
        tma_stores: Stores through the copy engine (`UTMASTG`).
        local_loads: Loads from local memory, i.e. spilled registers (`LDL`).
        local_stores: Stores to local memory (`STL`).
        wide_loads: Global loads of 16 bytes a thread, asynchronous ones included.
        wide_stores: Global stores of 16 bytes a thread.
        registers: Registers of a thread.
        shared_memory: Bytes of shared memory of a block.
        instructions: Machine instructions.
        sass: The disassembly.
    """

    qgmma: int
    tma_loads: int
    tma_stores: int
    local_loads: int
    local_stores: int
    wide_loads: int
    wide_stores: int
    registers: int
    shared_memory: int
    instructions: int
    sass: str


def compile_quantize(
    dtype: torch.dtype = torch.bfloat16,
    *,
    profile: str = numerics.DEFAULT_PROFILE,
    scale_layout: str = "row_major",
    block_k: int = 128,
    out_dtype: torch.dtype = torch.float8_e4m3fn,
    config: QuantizeConfig | None = None,
) -> MachineCode:
    """Compiles the quantization kernel for sm_90a as a launch on an aligned tensor with K a multiple of 16 does.

    Args:
        dtype: Of the tensor that is quantized.
        profile: A name of `numerics.PROFILES`.
        scale_layout: `"row_major"` or `"col_major"`.
        block_k: Columns of a block.
        out_dtype: The 8-bit format.
        config: The tile; left out, the one for many rows.

    Raises:
        CodegenError: Triton rejects the kernel.
    """
    rule = numerics.profile(profile)
    tile = config or quantize_config(1 << 20, block_k)
    types = {"x": f"*{_TRITON_TYPES[dtype]}", "q": f"*{_TRITON_TYPES[out_dtype]}", "scale": "*fp32"}
    constants = {
        "AMAX_FLOOR": rule.amax_floor,
        "TOP": numerics.FORMAT_MAX[out_dtype],
        "RECIPROCAL": rule.division == "reciprocal",
        "UE8M0": rule.scale_format == "ue8m0",
        "BLOCK_M": tile.block_m,
        "BLOCK_K": block_k,
    }
    if scale_layout == "col_major":
        constants["scale_stride_m"] = 1  # the JIT compiler folds a 1 as well
    return _compile(quantize_rows, types, constants, ("x", "q", "scale", "k", "x_stride"), {"num_warps": tile.warps})


def compile_gemm(
    config: GemmConfig,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    bias_dtype: torch.dtype | None = None,
    scale_layout: str = "col_major",
    aligned: bool = True,
) -> MachineCode:
    """Compiles one GEMM configuration for sm_90a.

    Args:
        config: Any configuration, also one that `codegen.tiling` would refuse.
        out_dtype: Of the result.
        bias_dtype: Of the bias, or None for none.
        scale_layout: Layout of the activations' scales.
        aligned: N and K are multiples of 16 and pointers of 16 bytes; only the pointer variant runs without.

    Raises:
        CodegenError: Triton rejects the kernel.
    """
    out, tma = _TRITON_TYPES[out_dtype], config.variant == "tma"
    if tma:
        types = {
            "a": f"tensordesc<fp8e4nv[{config.block_m}, {config.block_k}]>",
            "w": f"tensordesc<fp8e4nv[{config.block_n}, {config.block_k}]>",
            "out": f"tensordesc<{out}[{config.block_m}, {config.block_n}]>",
        }
    else:
        types = {"a": "*fp8e4nv", "w": "*fp8e4nv", "out": f"*{out}"}
    types |= {"a_scale": "*fp32", "w_scale": "*fp32"}
    constants: dict[str, Any] = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
        "w_scale_stride_k": 1,
    }
    if scale_layout == "col_major":
        constants["a_scale_stride_m"] = 1
    if bias_dtype is None:
        constants["bias"] = None
    else:
        types["bias"] = f"*{_TRITON_TYPES[bias_dtype]}"
    pointers = [name for name, kind in types.items() if kind.startswith("*")]
    divisible = (*pointers, "n", "k") if aligned else ()
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return _compile(scaled_gemm_tma if tma else scaled_gemm_pointers, types, constants, divisible, options)


def _compile(
    kernel: JITFunction[Any],
    types: dict[str, str],
    constants: dict[str, Any],
    divisible: tuple[str, ...],
    options: dict[str, int],
) -> MachineCode:
    """Compiles a kernel whose unnamed arguments are 32-bit integers; `divisible` ones are multiples of 16."""
    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    try:
        use_cache_folder()
        built = triton.compile(source, target=HOPPER, options=options)
    except Exception as error:  # Triton's own errors have no common base
        raise CodegenError(f"Triton cannot compile {kernel.__name__} for sm_90a", got=error) from error
    return _inspect(built.asm["cubin"], built.metadata.shared)


def _inspect(cubin: bytes, shared_memory: int) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        sass, usage = _cuobjdump("-sass", path), _cuobjdump("-res-usage", path)
    names = _INSTRUCTION.findall(sass)
    heads = Counter(name.split(".")[0] for name in names)
    registers = re.search(r"REG:(\d+)", usage)
    return MachineCode(
        qgmma=heads["QGMMA"],
        tma_loads=heads["UTMALDG"],
        tma_stores=heads["UTMASTG"],
        local_loads=heads["LDL"],
        local_stores=heads["STL"],
        wide_loads=sum(name.startswith(("LDG", "LDGSTS")) and ".128" in name for name in names),
        wide_stores=sum(name.startswith("STG") and ".128" in name for name in names),
        registers=int(registers[1]) if registers else 0,
        shared_memory=shared_memory,
        instructions=len(names),
        sass=sass,
    )


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
