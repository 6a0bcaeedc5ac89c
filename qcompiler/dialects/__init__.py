"""The operations, one file a dialect; importing this package fills the table of `qcompiler.ir.op_table`."""

from qcompiler.dialects import aten, core, grouped, kernel, quant

__all__ = ["aten", "core", "grouped", "kernel", "quant"]
