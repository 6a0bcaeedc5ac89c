"""vLLM runs qcompiler's checkpoints: `quantization="qcompiler"`, with the kernels in `torch.ops.qcompiler`.

vLLM finds `plugin.register` through its entry point group `vllm.general_plugins`. Only this package imports vLLM, and
nothing outside it imports this package.
"""
