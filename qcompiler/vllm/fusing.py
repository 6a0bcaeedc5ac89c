"""Adds `qcompiler.inductor` to the passes of vLLM's compiled graph, and logs its report.

QCOMPILER_VLLM_FUSE=1 vllm serve folder
LLM(folder, compilation_config={"inductor_compile_config": {"post_grad_custom_post_pass": FuseInEngine()}})
"""

from torch import fx
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.platforms import current_platform

from qcompiler import knobs
from qcompiler.inductor.fusing import FusionReport, fuse, sources_hash

logger = init_logger("vllm.qcompiler")


REPORTS: list[FusionReport] = []
"""One for each graph that this process compiled; none for graphs in vLLM's cache. vLLM copies its passes."""


class FuseInEngine(InductorPass):
    """`fuse` as a pass of vLLM."""

    def __call__(self, graph: fx.Graph) -> None:
        """Fuses in place."""
        report = fuse(graph)
        if report.quantizations[1]:
            REPORTS.append(report)
            logger.info("%s", report)

    def uuid(self) -> str:
        """A part of the keys of the caches of vLLM and of Inductor."""
        return sources_hash()


def enable() -> None:
    """Adds the pass to the configuration of the model that vLLM builds, if the environment asks for it.

    Another pass in the same place remains, and ours is not added. Nor is it for models of vLLM's Transformers backend,
    which reads the configuration before it makes layers.
    """
    config = get_current_vllm_config_or_none()
    if config is None or not knobs.current().vllm_fuse:
        return
    if config.model_config is not None and config.model_config.using_transformers_backend():
        logger.warning_once("qcompiler's fusing pass is not added: vLLM runs this model with its Transformers backend. "
                            "Add it in Python: see qcompiler.vllm.fusing.")  # fmt: skip
        return
    options = config.compilation_config.inductor_compile_config
    found = options.setdefault(current_platform.pass_key, FuseInEngine())
    if not isinstance(found, FuseInEngine):
        logger.warning_once("qcompiler's fusing pass is not added: the configuration has another pass in its place.")
