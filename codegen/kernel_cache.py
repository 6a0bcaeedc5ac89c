"""Location of compiled kernels: Triton's disk cache, in the folder named by QCOMPILER_CACHE_DIR.

Triton's cache is content-addressed (source of the kernel and its callees, constants, signature, target, options, Triton
version) and written atomically, so each kernel is compiled once per machine. If the variable is not set, Triton's
default folder is used and shared with other users of Triton.
"""

from functools import cache

import triton

from qcompiler import knobs


@cache
def use_cache_folder() -> str:
    """Points Triton to the folder, once per process before the first compilation; returns the folder in use."""
    folder = knobs.current().cache_dir
    if folder is not None:
        triton.knobs.cache.dir = str(folder)
    return str(triton.knobs.cache.dir)
