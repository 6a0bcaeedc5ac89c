"""Checkpoints of the ecosystem: compiled models written as them, and models read from them.

write(compiled, "out", "fp8")                   Hugging Face's block FP8
write(compiled, "out", "compressed-tensors")    FP8 or INT8
"""

from qcompiler.checkpoints.writing import write

__all__ = ["write"]
