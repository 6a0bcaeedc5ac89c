"""The passes, one file each; importing this package makes them known by name.

Beside them stands what several of them ask or do: `candidates` (which operations read weights, and why one is left
alone), `layers` (which of those a pass is for), `scheme_options` (what the passes of a scheme share), `memory` (which
values share memory), `constants` (weights that a pass adds), `grouped` (what the quantizing passes do to mixtures of
experts); behind the passes that fuse kernels, `arithmetic` (what a body can say), `regions` (how far it may reach),
`region_bodies` (its text) and `fused_producer` (the rule that two of them share); and behind smoothquant, from the
bottom up, `channel_labels`, `channel_rules` (what commutes with a scale per channel), `channel_scale` (what a scale
concerns), `scale_fold` (the rewrite) and `smooth_scales` (the numbers).
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
