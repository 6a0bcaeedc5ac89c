"""The passes, one file each; importing this package makes them known by name.

What several passes ask about a graph stands in `candidates` (which operations read weights) and `memory` (which values
share memory).
"""

from passes import calibrate, canonicalize, dead_code, fold_constants, fp8_tile, fuse_linear, share_quantize, to_kernels

OWNER = "qcompiler"

__all__ = [
    "OWNER", "calibrate", "canonicalize", "dead_code", "fold_constants", "fp8_tile", "fuse_linear", "share_quantize",
    "to_kernels",
]  # fmt: skip
