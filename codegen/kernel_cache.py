"""Where compiled kernels are kept: Triton's own disk cache, in the folder that QCOMPILER_CACHE_DIR names.

Triton's cache is addressed by content (the source of the kernel and of all that it calls, constants, signature,
target, options, Triton's version) and written atomically, so a kernel is compiled once for a machine, by whichever
process meets it first. Without the variable Triton's default folder is used, and shared with other users of Triton.
"""

from functools import cache

import triton

from qcompiler import knobs


@cache
def use_cache_folder() -> str:
    """Points Triton to the folder, once a process and before the first kernel is compiled; the folder in use."""
    folder = knobs.current().cache_dir
    if folder is not None:
        triton.knobs.cache.dir = str(folder)
    return str(triton.knobs.cache.dir)
