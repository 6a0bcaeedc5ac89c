"""The passes, one file each; importing this package imports all files below it, which makes them known by name.

Shared by several passes: `candidates` (which operations read weights, and why some are skipped), `layers` (which of
those a pass selects), `scheme_options` (options of the passes of a scheme), `memory` (which values share memory),
`constants` (weights that a pass adds), and `grouped` (quantization of mixture-of-experts matmuls). Fusion passes use
`arithmetic` (what a fused expression can compute), `fusion_regions` (how far a region may extend),
`region_expressions` (its text) and `fused_producer` (the rule that two of them share). The pass `fuse-pointwise` uses
`element_moves` (where moved elements come from), `pointwise_regions` and `pointwise_expressions`. SmoothQuant uses,
from the bottom up, `channel_labels`, `channel_rules` (what commutes with a per-channel scale), `channel_scale` (what a
scale affects), `scale_fold` (the rewrite) and `smooth_scales` (the numbers). The pass `attention` uses, from the bottom
up, `inequalities` (conditions over integers), `index_expressions`, `index_arithmetic`, `index_moves`, `stored_indices`,
`elements` (elements of masks as expressions of their indices) and `causal_masks` (which masks are causal).
"""

from importlib import import_module
from pkgutil import walk_packages

for _found in walk_packages(__path__, f"{__name__}."):
    import_module(_found.name)
