"""The passes, one file each; importing this package makes them known by name.

Beside them stands what several of them ask or do: `candidates` (which operations read weights, and why one is left
alone), `layers` (which of those a pass is for), `scheme_options` (what the passes of a scheme share), `memory` (which
values share memory), `constants` (weights that a pass adds), `grouped` (what the quantizing passes do to mixtures of
experts); behind the passes that fuse kernels, `arithmetic` (what a body can say), `regions` (how far it may reach),
`region_bodies` (its text) and `fused_producer` (the rule that two of them share); and behind smoothquant, from the
bottom up, `channel_labels`, `channel_rules` (what commutes with a scale per channel), `channel_scale` (what a scale
concerns), `scale_fold` (the rewrite) and `smooth_scales` (the numbers).
"""

from passes import (
    calibrate,
    canonicalize,
    dead_code,
    fold_constants,
    fp8_tile,
    fuse_activation_quantize,
    fuse_epilogue,
    fuse_linear,
    fuse_norm_quantize,
    fuse_prescale,
    merge_linears,
    quantize,
    share_quantize,
    smoothquant,
    to_kernels,
)

OWNER = "qcompiler"

__all__ = [
    "OWNER", "calibrate", "canonicalize", "dead_code", "fold_constants", "fp8_tile", "fuse_activation_quantize",
    "fuse_epilogue", "fuse_linear", "fuse_norm_quantize", "fuse_prescale", "merge_linears", "quantize",
    "share_quantize", "smoothquant", "to_kernels",
]  # fmt: skip
