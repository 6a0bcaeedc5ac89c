"""The operations of `qcompiler.inductor`: nodes of an fx graph that our passes do not understand.

%attention = fx.call(%q, %k, %v)

`fx.call` may do anything, so passes keep it where it is. `fx.pure` is a function that they know nothing about.
"""

from qcompiler.ir import Effects
from qcompiler.ir.op_table import OpDef, declare

CALL, PURE = "fx.call", "fx.pure"

declare(OpDef(CALL, "A node that may do anything.", ("*",), effects=Effects.READS | Effects.WRITES))
declare(OpDef(PURE, "A node that computes an unknown function.", ("*",)))
