"""NVIDIA Hopper: the target `sm_90a`. Its templates and their measured times are in `codegen.templates`."""

from triton.backends.compiler import GPUTarget

from codegen.targets.cuda import CudaTarget
from codegen.templates.limits import MULTIPROCESSORS, Limits
from qcompiler.runtime.device import register

HOPPER = register(
    CudaTarget(
        "sm_90a",
        "cuda",
        "NVIDIA Hopper: Triton kernels on FP8 tensor cores",
        words=("gpu", "nvidia", "hopper", "h100", "h200", "h800", "h20", "gh200", "sm90", "sm_90", "sm90a", "triton"),
        kernels="from codegen.direct import kernels",  # torch's dispatcher takes as much time as a launch
        passes="fuse-pointwise; fuse-append; token-major; fuse-attend; group-entries",
        generation="Hopper",
        capability=(9, 0),
        gpu=GPUTarget("cuda", 90, 32),
        limits=Limits(MULTIPROCESSORS, shared_memory=232448, overlap=True),
    )
)
