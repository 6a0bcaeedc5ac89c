"""Our fusing passes inside `torch.compile`: a pass of Inductor over models that call qcompiler's operators.

    from torch._inductor import config
    from qcompiler.inductor import FuseQuantize

    fuse = FuseQuantize()
    with config.patch(post_grad_custom_post_pass=fuse):
        compiled = torch.compile(model, fullgraph=True)
        compiled(ids)
    print(fuse.reports[0])          which quantizations were fused, and why the others were not

It serves models whose layers quantize their own inputs, such as the layers of `qcompiler.transformers` and of the
plug-in for vLLM: the norm or activation before a quantization becomes a part of it.
"""

from qcompiler.inductor.fusing import FuseQuantize as FuseQuantize
from qcompiler.inductor.fusing import FusionReport as FusionReport
from qcompiler.inductor.fusing import fuse as fuse
