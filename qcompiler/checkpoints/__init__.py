"""Reads and writes checkpoints in the formats of Hugging Face, vLLM and ModelOpt.

write(compiled, "out", "fp8")                   Hugging Face's block FP8
write(compiled, "out", "compressed-tensors")    FP8 or INT8
load_model("out")                               a model that keeps quantized weights as codes and scales

Each format is a file in `formats/`, or in `read_only/` if it is not written.
"""

from qcompiler.checkpoints.loading import load_model
from qcompiler.checkpoints.reading import Checkpoint, read
from qcompiler.checkpoints.smoothing import smoothing
from qcompiler.checkpoints.writing import write

__all__ = ["Checkpoint", "load_model", "read", "smoothing", "write"]
