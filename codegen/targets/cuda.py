"""Targets whose kernels Triton compiles for NVIDIA GPUs; each generation is one file.

    HOPPER = register(CudaTarget("sm_90a", "cuda", …, capability=(9, 0), limits=Limits(…)))

Portable templates run on it at once. The others need times that were measured on it: see `KernelOp.add`.
"""

from dataclasses import dataclass
from functools import cache

import torch
from triton.backends.compiler import GPUTarget

from codegen import support
from codegen.kernel_cache import use_cache_folder
from codegen.launching.launch import KernelCall
from codegen.machine_code import MachineCode, compile_call
from codegen.templates.limits import Limits
from qcompiler.errors import CodegenError
from qcompiler.ir import Format
from qcompiler.runtime.device import CUDA, Target, targets_on

FP8_FROM = (8, 9)
"""Minimum compute capability for calling operators outside compiled models."""


@dataclass(frozen=True, kw_only=True)
class CudaTarget(Target):
    """A GPU generation: what it supports, and what its kernels may use.

    Attributes:
        generation: Its name.
        capability: The compute capability that a device must have.
        gpu: The GPU that Triton compiles for ahead of time.
        limits: The limits of its multiprocessors and its copy engine.
    """

    generation: str
    capability: tuple[int, int]
    gpu: GPUTarget
    limits: Limits

    def check(self, device: torch.device) -> None:
        """Raises CodegenError unless the device is a GPU of this generation."""
        super().check(device)
        if (capability := torch.cuda.get_device_capability(device)) != self.capability:
            raise CodegenError(
                f"{torch.cuda.get_device_name(device)} cannot run the kernels of the target {self.name}",
                got=f"compute capability {_text(capability)}",
                need=f"{_text(self.capability)} ({self.generation})",
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


@cache
def gpu_at(device: torch.device) -> CudaTarget:
    """The target whose kernels the operators launch on a CUDA device; also sets the kernel cache location.

    On a GPU without a target, the operators run outside compiled models as on the latest earlier generation, or else on
    the earliest one, as far as its kernels do.

    Raises:
        CodegenError: The device has no FP8.
    """
    use_cache_folder()
    capability, known = torch.cuda.get_device_capability(device), list[CudaTarget]()
    if capability < FP8_FROM:
        raise CodegenError(
            "this GPU has no FP8",
            got=f"{torch.cuda.get_device_name(device)}, compute capability {_text(capability)}",
            need=f"compute capability {_text(FP8_FROM)} or later",
            fix="Compile the model for the target 'cpu' on this machine.",
        )
    for target in targets_on(CUDA):  # lazily and ours first: other distributions are loaded only if needed
        if isinstance(target, CudaTarget):
            if target.capability == capability:
                return target
            known.append(target)
    earlier = [target for target in known if target.capability < capability]
    return max(earlier, key=_capability) if earlier else min(known, key=_capability)


def _capability(target: CudaTarget) -> tuple[int, int]:
    return target.capability


def _text(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
