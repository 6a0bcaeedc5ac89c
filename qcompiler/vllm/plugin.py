"""What vLLM calls in each of its processes: registers the operators and the quantization method."""

from importlib import import_module


def register() -> None:
    """Registers `torch.ops.qcompiler` and `quantization="qcompiler"`; may be called several times."""
    for module in ("codegen.torch_ops", "qcompiler.vllm.config"):
        import_module(module)
    import_module("qcompiler.vllm.verifying").install()
