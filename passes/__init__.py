"""The passes, one file each; importing this package makes them known by name.

Beside them stands what several of them ask or do: `candidates` (which operations read weights, and why one is left
alone), `layers` (which of those a pass is for), `scheme_options` (what the passes of a scheme share), `memory` (which
values share memory), `constants` (weights that a pass adds); and behind smoothquant, from the bottom up,
`channel_labels`, `channel_rules` (what commutes with a scale per channel), `channel_scale` (what a scale concerns),
`scale_fold` (the rewrite) and `smooth_scales` (the numbers).
"""

from passes import (
    calibrate,
    canonicalize,
    dead_code,
    fold_constants,
    fp8_tile,
    fuse_linear,
    fuse_prescale,
    quantize,
    share_quantize,
    smoothquant,
    to_kernels,
)

OWNER = "qcompiler"

__all__ = [
    "OWNER", "calibrate", "canonicalize", "dead_code", "fold_constants", "fp8_tile", "fuse_linear", "fuse_prescale",
    "quantize", "share_quantize", "smoothquant", "to_kernels",
]  # fmt: skip
