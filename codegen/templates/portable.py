"""The portable Triton kernels of the scaled matmul: with pointers, or the copy engine for scales inside the sum."""

from typing import Any

from triton.tools.tensor_descriptor import TensorDescriptor

from codegen.kernels.row_gemm import row_gemm_pointers
from codegen.kernels.scaled_gemm import scaled_gemm_pointers, scaled_gemm_tma
from codegen.launching.launch import KernelCall, descriptor
from codegen.templates.gemm import GemmConfig, GemmOperands, tiles_of
from codegen.templates.gemm_template import GemmTemplate


class PointerGemm(GemmTemplate):
    """Operands of any alignment."""

    copies = stores = False
    kernel = scaled_gemm_pointers

    def calls(self, config: GemmConfig, operands: GemmOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        *_, x_scale, w_scale, bias, x_block, _ = operands
        m, n, k = operands.sizes
        kernel, last = self.kernel, {"X_BLOCK": x_block}
        strides: tuple[int, ...] = (*x_scale.stride(), *w_scale.stride())
        if x_block is None:
            kernel, last, strides = row_gemm_pointers, {"PROMOTE": operands.promoted}, operands.scale_strides
        arguments = (*self.matrices(config, operands), x_scale, w_scale, bias, m, n, k, *strides)
        sizes = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
        options = {"num_warps": config.warps, "num_stages": config.stages}
        return (
            KernelCall(kernel, tiles_of(config, m, n), arguments, {**sizes, "GROUP": config.group, **last}, options),
        )

    def matrices(self, config: GemmConfig, operands: GemmOperands) -> tuple[Any, Any, Any]:
        """x, w, and out in the form that the kernel takes."""
        return operands.x, operands.w, operands.out


class CopyEngineGemm(PointerGemm):
    """The same with tensor descriptors, for scales inside the sum."""

    copies = stores = True
    kernel = scaled_gemm_tma

    def matrices(self, config: GemmConfig, operands: GemmOperands) -> tuple[Any, Any, Any]:
        """See `PointerGemm`."""
        m, n, k = operands.sizes
        return (
            descriptor(TensorDescriptor, operands.x, [m, k], k, [config.block_m, config.block_k]),
            descriptor(TensorDescriptor, operands.w, [n, k], k, [config.block_n, config.block_k]),
            descriptor(TensorDescriptor, operands.out, [m, n], n, [config.block_m, config.block_n]),
        )
