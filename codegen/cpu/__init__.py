"""The kernels of the target `cpu`: plain torch with few calls, bit-equal to `qcompiler.numerics` and the dialects."""
