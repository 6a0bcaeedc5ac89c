"""The passes, one file each; importing this package makes them known by name.

Shared by several passes: `candidates` (which operations read weights, and why some are skipped), `layers` (which of
those a pass selects), `scheme_options` (options of the passes of a scheme), `memory` (which values share memory),
`constants` (weights that a pass adds), and `grouped` (quantization of mixture-of-experts matmuls). Fusion passes use
`arithmetic` (what a fused expression can compute), `fusion_regions` (how far a region may extend),
`region_expressions` (its text) and `fused_producer` (the rule that two of them share). SmoothQuant uses, from the
bottom up, `channel_labels`, `channel_rules` (what commutes with a per-channel scale), `channel_scale` (what a scale
affects), `scale_fold` (the rewrite) and `smooth_scales` (the numbers).
"""

from passes.cleanup import canonicalize as canonicalize
from passes.cleanup import dead_code as dead_code
from passes.cleanup import fold_constants as fold_constants
from passes.fusing import fuse_activation_quantize as fuse_activation_quantize
from passes.fusing import fuse_epilogue as fuse_epilogue
from passes.fusing import fuse_norm_quantize as fuse_norm_quantize
from passes.fusing import fuse_prescale as fuse_prescale
from passes.fusing import merge_linears as merge_linears
from passes.lowering import to_kernels as to_kernels
from passes.quantizing import calibrate as calibrate
from passes.quantizing import fp8_tile as fp8_tile
from passes.quantizing import fuse_linear as fuse_linear
from passes.quantizing import quantize as quantize
from passes.quantizing import share_quantize as share_quantize
from passes.smoothing import smoothquant as smoothquant
