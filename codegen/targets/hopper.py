"""NVIDIA Hopper: the target `sm_90a`."""

from functools import cache

import torch
from triton.backends.compiler import GPUTarget

from codegen.kernel_cache import use_cache_folder
from codegen.targets import hopper_paces as paces
from codegen.targets.cuda import CudaTarget
from codegen.templates.fused import FusedGemm, SeparateKernels
from codegen.templates.fused_quantize import FusedQuantize, fused_quantize_configs
from codegen.templates.gemm import GemmConfig, GemmOperands, GemmProblem
from codegen.templates.grouped import GroupedNarrow, GroupedWide
from codegen.templates.narrow import NarrowGemm
from codegen.templates.portable import CopyEngineGemm, PointerGemm
from codegen.templates.quantize import QuantizeKnown, QuantizeTensor, QuantizeTiles, QuantizeTokens, quantize_configs
from codegen.templates.template import Family
from codegen.templates.warp import SplitGemm, WarpGemm
from qcompiler.errors import CodegenError
from qcompiler.runtime.device import register

OPERATORS_FROM = (8, 9)
"""Minimum compute capability for calling operators outside compiled models."""

GEMM: Family[GemmConfig, GemmProblem, GemmOperands] = Family(
    "product",
    {
        "warp": WarpGemm(),
        "split": SplitGemm(),
        "narrow": NarrowGemm(),
        "tma": CopyEngineGemm(),
        "pointers": PointerGemm(),
    },
    lambda problem: paces.GEMM[problem.kind, problem.step],
)

HOPPER = register(
    CudaTarget(
        "sm_90a",
        "cuda",
        "NVIDIA Hopper: Triton kernels on FP8 tensor cores",
        words=("gpu", "nvidia", "hopper", "h100", "h200", "h800", "h20", "gh200", "sm90", "sm_90", "sm90a", "triton"),
        kernels="from codegen.direct import kernels",  # torch's dispatcher takes as much time as a launch
        generation="Hopper",
        capability=(9, 0),
        gpu=GPUTarget("cuda", 90, 32),
        gemm=GEMM,
        fused_gemm=Family(
            "matmul with an epilogue",
            {"fused": FusedGemm(), "separate": SeparateKernels(GEMM)},
            lambda problem: paces.FUSED_GEMM,
        ),
        grouped_gemm=Family(
            "grouped product",
            {"narrow": GroupedNarrow(), "wide": GroupedWide()},
            lambda problem: paces.GROUPED_GEMM,
        ),
        quantize=Family(
            "quantization",
            {
                "tiles": QuantizeTiles(),
                "tokens": QuantizeTokens(),
                "tensor": QuantizeTensor(),
                "known": QuantizeKnown(),
            },
            quantize_configs,
        ),
        fused_quantize=Family("fused quantization", {"fused": FusedQuantize()}, fused_quantize_configs),
    )
)


@cache
def check_device(device: torch.device) -> None:
    """Raises CodegenError without FP8 support; runs once per device, so it also sets the kernel cache location."""
    use_cache_folder()
    capability = torch.cuda.get_device_capability(device)
    if capability < OPERATORS_FROM:
        name = torch.cuda.get_device_name(device)
        raise CodegenError(
            "this GPU has no FP8", got=f"{name}, compute capability {capability[0]}.{capability[1]}",
            need=f"compute capability {OPERATORS_FROM[0]}.{OPERATORS_FROM[1]} or later",
            fix="Compile the model for the target 'cpu' on this machine.",
        )  # fmt: skip
