"""Differences between Gluon versions, from Triton 3.6 to 3.9: the one file to change for a new version.

    here           Triton 3.9                               earlier name
    async_load     tma.async_load                           tma.async_copy_global_to_shared, up to 3.7
    async_store    tma.async_store                          tma.async_copy_shared_to_global, up to 3.7
    barrier        gl.barrier                               gl.thread_barrier, up to 3.6
    reinterpret    shared_memory_descriptor.reinterpret     shared_memory_descriptor._reinterpret, up to 3.8

Each name is resolved by what the installed Triton provides, not by its version number, which development builds share
with releases. All kernels import these names from here.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

_IS_3_9 = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@builtin
def reinterpret(memory, dtype, shape, layout, _semantic=None):  # type: ignore[no-untyped-def]
    """Views shared memory with another dtype, shape and layout."""
    view = memory.reinterpret if _IS_3_9 else memory._reinterpret
    return view(dtype, shape, layout, _semantic=_semantic)


@gluon.jit
def computed_here(numbers):  # type: ignore[no-untyped-def]
    """The same int32 tensor, with its computation kept from moving before this point.

    From 3.9 on, LLVM hoists values that depend only on the thread number out of a partition of `gl.warp_specialize`;
    ptxas then spills them on entry. An instruction that must not move prevents this. Before 3.9, a no-op.
    """
    if _IS_3_9:
        return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [numbers], dtype=gl.int32, is_pure=False, pack=1)
    else:
        return numbers
