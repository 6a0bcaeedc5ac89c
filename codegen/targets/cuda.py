"""Targets whose kernels Triton compiles for NVIDIA GPUs."""

from dataclasses import dataclass

import torch
from triton.backends.compiler import GPUTarget

from codegen import support
from codegen.launching.launch import KernelCall
from codegen.machine_code import MachineCode, compile_call
from codegen.templates.fused import FusedGemmConfig, FusedGemmProblem, FusedOperands, Separate
from codegen.templates.fused_quantize import FusedQuantizeConfig, FusedQuantizeOperands, FusedQuantizeProblem
from codegen.templates.gemm import GemmConfig, GemmOperands, GemmProblem
from codegen.templates.grouped import GroupedConfig, GroupedOperands, GroupedProblem
from codegen.templates.quantize import QuantizeConfig, QuantizeOperands, QuantizeProblem
from codegen.templates.template import Family
from qcompiler.errors import CodegenError
from qcompiler.ir import Format
from qcompiler.runtime.device import Target


@dataclass(frozen=True, kw_only=True)
class CudaTarget(Target):
    """A GPU generation: what it supports, and with which kernels.

    Attributes:
        generation: Its name.
        capability: The compute capability that a device must have.
        gpu: The GPU that Triton compiles for ahead of time.
        gemm: The templates of the scaled matmul.
        fused_gemm: The templates of the matmul with an epilogue.
        grouped_gemm: The templates of the grouped matmul.
        quantize: The templates of quantization.
        fused_quantize: The templates of quantization with a prologue.
    """

    generation: str
    capability: tuple[int, int]
    gpu: GPUTarget
    gemm: Family[GemmConfig, GemmProblem, GemmOperands]
    fused_gemm: Family[FusedGemmConfig | Separate, FusedGemmProblem, FusedOperands]
    grouped_gemm: Family[GroupedConfig, GroupedProblem, GroupedOperands]
    quantize: Family[QuantizeConfig, QuantizeProblem, QuantizeOperands]
    fused_quantize: Family[FusedQuantizeConfig, FusedQuantizeProblem, FusedQuantizeOperands]

    def check(self, device: torch.device) -> None:
        """Raises CodegenError unless the device is a GPU of this generation."""
        super().check(device)
        if (capability := torch.cuda.get_device_capability(device)) != self.capability:
            raise CodegenError(
                f"{torch.cuda.get_device_name(device)} cannot run the kernels of the target {self.name}",
                got=f"compute capability {capability[0]}.{capability[1]}",
                need=f"{self.capability[0]}.{self.capability[1]} ({self.generation})",
                fix='Move the model to the CPU to compile it for target="cpu".',
            )

    def why_not(self, x: Format, w: Format) -> str | None:
        """Why the kernels cannot run a scaled linear: see `codegen.support.why_not`."""
        return support.why_not(x, w)

    def compile(self, call: KernelCall) -> MachineCode:
        """Compiles a kernel call ahead of time, without a GPU or driver; operands may be without data.

        Raises:
            CodegenError: Triton rejects the kernel.
        """
        return compile_call(call, self.gpu, self.name)
