"""The dialects, one module each; importing this package fills the operation table."""

from qcompiler.dialects import aten, attention, core, grouped, kernel, quant, state

__all__ = ["aten", "attention", "core", "grouped", "kernel", "quant", "state"]
