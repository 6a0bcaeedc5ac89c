"""The dialects, one module each; importing this package fills the operation table."""

from qcompiler.dialects import aten, core, grouped, kernel, quant

__all__ = ["aten", "core", "grouped", "kernel", "quant"]
