"""The version of the CUDA driver, without initializing it."""

import ctypes
from functools import cache


@cache
def driver_version() -> int | None:
    """The newest version of CUDA that the driver supports, such as 12080 for 12.8; None without a driver."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return None if failed else version.value
