"""Tables along the sequence: elementwise operations and moves, each with a label, checked on numbers, and a refusal."""

import pytest
from sequence_cases import B_P_8, HEADS, ONE, POSITIONS, ROUTED, check_legal, check_refused

from passes.analyses.sequence_elementwise import ELEMENTWISE_RULES
from passes.analyses.sequence_moves import MOVES

UNARY = (
    "aten._to_copy", "aten.to.dtype", "aten.contiguous", "aten.alias", "aten.detach", "aten.lift_fresh_copy",
    "aten.hardswish", "aten.clone",
)  # fmt: skip

LEGAL: dict[str, tuple[str, str]] = {
    **{name: (f"%r = {name}(%x) : f32[s0, s1, 8]", B_P_8) for name in UNARY},
    "aten._to_copy": ("%r = aten._to_copy(%x) {dtype = f64} : f64[s0, s1, 8]", B_P_8),
    "aten.to.dtype": ("%r = aten.to.dtype(%x, f64) : f64[s0, s1, 8]", B_P_8),
    "aten.type_as": ("%r = aten.type_as(%x, %p) : i64[s0, s1, 8]", B_P_8),
    "aten.where.ScalarOther": ("%m = aten.gt.Scalar(%x, 0) : b8[s0, s1, 8]\n"
                               "%r = aten.where.ScalarOther(%m, %x, 0.0) : f32[s0, s1, 8]", B_P_8),
    "aten.where.ScalarSelf": ("%m = aten.gt.Scalar(%x, 0) : b8[s0, s1, 8]\n"
                              "%r = aten.where.ScalarSelf(%m, 0.0, %x) : f32[s0, s1, 8]", B_P_8),
    "aten.where.Scalar": ("%m = aten.gt.Scalar(%x, 0) : b8[s0, s1, 8]\n"
                          "%r = aten.where.Scalar(%m, 0.0, 1.0) : f32[s0, s1, 8]", B_P_8),
    "aten.masked_fill.Tensor": ("%m = aten.gt.Scalar(%x, 0) : b8[s0, s1, 8]\n%z = aten.zeros([]) : f32[]\n"
                                "%r = aten.masked_fill.Tensor(%x, %m, %z) : f32[s0, s1, 8]", B_P_8),
    "aten.floor_divide": (ROUTED + "%r = aten.floor_divide(%x, 2) : f32[s0, s1, 8]", B_P_8),
    "aten.floor_divide.Scalar": ("%r = aten.floor_divide.Scalar(%x, 2) : f32[s0, s1, 8]", B_P_8),
    "aten.div.Tensor_mode": ('%r = aten.div.Tensor_mode(%x, 2) {rounding_mode = "floor"} : f32[s0, s1, 8]', B_P_8),
    "aten.polar": ("%r = aten.polar(%x, %x) : c64[s0, s1, 8]", B_P_8),
    "aten.complex": ("%r = aten.complex(%x, %x) : c64[s0, s1, 8]", B_P_8),
    "aten.dropout": ("%r = aten.dropout(%x, 0.5, false) : f32[s0, s1, 8]", B_P_8),
    "aten.sym_size.int": ("%r = aten.view(%t, [%n0, %n1, 8]) : f32[s0, s1, 8]", B_P_8),
    "aten.sym_numel": ("%n = aten.sym_numel(%x) : int(8*s0*s1)\n%r = aten.view(%x, [%n]) : f32[8*s0*s1]",
                       "[batch*positions*8]"),
    **{f"aten.{name}": (f"%r = aten.{name}([%n0, 8]) : f32[s0, 8]", "[=s0, 8]") for name in ("zeros", "ones")},
    **{f"aten.{name}_like": (f"%r = aten.{name}_like(%x) : f32[s0, s1, 8]", "[=s0, =s1, 8]")
       for name in ("zeros", "ones")},
    **{f"aten.new_{name}": (f"%r = aten.new_{name}(%x, [%n0, 8]) : f32[s0, 8]", "[=s0, 8]")
       for name in ("zeros", "ones")},
    **{name: (f"%z = {name}({args}) : f32[s0, s1, 8]\n%r = aten.copy(%z, %x) : f32[s0, s1, 8]", B_P_8)
       for name, args in {"aten.empty_like": "%x", "aten.new_empty": "%x, [%n0, %n1, 8]",
                          "aten.empty.memory_format": "[%n0, %n1, 8]"}.items()},
    "aten.full": ("%r = aten.full([%n0, 8], 2.0) : f32[s0, 8]", "[=s0, 8]"),
    "aten.full_like": ("%r = aten.full_like(%x, 2.0) : f32[s0, s1, 8]", "[=s0, =s1, 8]"),
    "aten.new_full": ("%r = aten.new_full(%x, [%n0, 8], 2.0) : f32[s0, 8]", "[=s0, 8]"),
    "aten.arange": ("%r = aten.arange(%n1) : i64[s1]", POSITIONS),
    "aten.arange.start": ("%n = core.add(%n1, 2) : int(s1 + 2)\n%r = aten.arange.start(2, %n) : i64[s1]", POSITIONS),
    "aten.arange.start_step": ("%r = aten.arange.start_step(0, %n1, 1) : i64[s1]", POSITIONS),
    "aten.cumsum": (ONE + "%r = aten.cumsum(%one, 1) : f32[s0, s1]", "[=s0, positions]"),
    "aten.view": ("%r = aten.view(%x, [-1, 2, 4]) : f32[s0*s1, 2, 4]", "[batch*positions, 2, 4]"),
    "aten.reshape": ("%r = aten.reshape(%c, [-1, %n1]) : f32[8*s0, s1]", "[batch*8, positions]"),
    "aten._unsafe_view": ("%r = aten._unsafe_view(%h, [-1, 1, 8]) : f32[s0*s1, 1, 8]", "[batch*positions, 1, 8]"),
    "aten.view_as": ("%r = aten.view_as(%t, %x) : f32[s0, s1, 8]", B_P_8),
    "aten.flatten.using_ints": ("%r = aten.flatten.using_ints(%x, 1) : f32[s0, 8*s1]", "[batch, positions*8]"),
    "aten.unflatten.int": ("%r = aten.unflatten.int(%x, 2, [2, 4]) : f32[s0, s1, 2, 4]", "[batch, positions, 2, 4]"),
    "aten.unsqueeze": ("%r = aten.unsqueeze(%x, 1) : f32[s0, 1, s1, 8]", "[batch, 1, positions, 8]"),
    "aten.squeeze": ("%u = aten.unsqueeze(%x, 1) : f32[s0, 1, s1, 8]\n%r = aten.squeeze(%u) : f32[s0, s1, 8]", B_P_8),
    "aten.squeeze.dim": ("%u = aten.unsqueeze(%x, 1) : f32[s0, 1, s1, 8]\n"
                         "%r = aten.squeeze.dim(%u, 1) : f32[s0, s1, 8]", B_P_8),
    "aten.squeeze.dims": ("%u = aten.unsqueeze(%x, 1) : f32[s0, 1, s1, 8]\n"
                          "%r = aten.squeeze.dims(%u, [1]) : f32[s0, s1, 8]", B_P_8),
    "aten.t": ("%r = aten.t(%t) : f32[8, s0*s1]", "[8, batch*positions]"),
    "aten.transpose.int": ("%r = aten.transpose.int(%h, 1, -2) : f32[s0, 4, s1, 2]", "[batch, 4, positions, 2]"),
    "aten.permute": ("%u = aten.permute(%x, [1, 0, 2]) : f32[s1, s0, 8]\n%r = aten.view(%u, [-1, 8]) : f32[s0*s1, 8]",
                     "[positions*batch, 8]"),
    "aten.expand": ("%u = aten.unsqueeze(%p, 0) : i64[1, s1]\n%r = aten.expand(%u, [%n0, -1]) : i64[s0, s1]",
                    "[=s0, positions]"),
    "aten.copy": ("%z = aten.zeros([%n0, %n1, 8]) : f32[s0, s1, 8]\n%r = aten.copy(%z, %x) : f32[s0, s1, 8]", B_P_8),
    "aten.repeat": ("%u = aten.repeat(%x, [1, 1, 3]) : f32[s0, s1, 24]\n"
                    "%r = aten.repeat(%u, [1, 2, 1]) : f32[s0, 2*s1, 24]", "[batch, 2*positions, 24]"),
    "aten.view_as_complex": ("%r = aten.view_as_complex(%h) : c64[s0, s1, 4]", "[batch, positions, 4]"),
    "aten.view_as_real": ("%u = aten.complex(%x, %x) : c64[s0, s1, 8]\n"
                          "%r = aten.view_as_real(%u) : f32[s0, s1, 8, 2]", "[batch, positions, 8, 2]"),
    "aten.repeat_interleave.self_int": ("%r = aten.repeat_interleave.self_int(%h, 3, 2) : f32[s0, s1, 12, 2]",
                                        "[batch, positions, 12, 2]"),
    "aten.slice.Tensor": ("%u = aten.slice.Tensor(%x, 1, 0, 9223372036854775807) : f32[s0, s1, 8]\n"
                          "%r = aten.slice.Tensor(%u, -1, 1, 7, 2) : f32[s0, s1, 3]", "[batch, positions, 3]"),
    "aten.select.int": ("%r = aten.select.int(%h, 2, -1) : f32[s0, s1, 2]", "[batch, positions, 2]"),
    "aten.split.Tensor": ("%r, %u = aten.split.Tensor(%x, 5, -1) : f32[s0, s1, 5], f32[s0, s1, 3]",
                          "[batch, positions, 5]"),
    "aten.split_with_sizes": ("%r, %u = aten.split_with_sizes(%x, [1, 7], 2) : f32[s0, s1, 1], f32[s0, s1, 7]",
                              "[batch, positions, 1]"),
    "aten.chunk": ("%r, %u = aten.chunk(%c, 2, 1) : f32[s0, 4, s1], f32[s0, 4, s1]", "[batch, 4, positions]"),
    "aten.unbind.int": ("%r, %u = aten.unbind.int(%h, 3) : f32[s0, s1, 4], f32[s0, s1, 4]", "[batch, positions, 4]"),
    "aten.cat": ("%r = aten.cat([%c, %c], 1) : f32[s0, 16, s1]", "[batch, 16, positions]"),
    "aten.stack": ("%r = aten.stack([%x, %x], 1) : f32[s0, 2, s1, 8]", "[batch, 2, positions, 8]"),
    "aten.flip": ("%r = aten.flip(%x, [2]) : f32[s0, s1, 8]", B_P_8),
    "aten.roll": ("%r = aten.roll(%h, [1, 1], [2, 3]) : f32[s0, s1, 4, 2]", HEADS),
    "aten.constant_pad_nd": ("%r = aten.constant_pad_nd(%x, [1, 2, 0, 0], 0) : f32[s0, s1, 11]",
                             "[batch, positions, 11]"),
    "aten.slice_scatter": ("%u = aten.slice.Tensor(%x, 2, 0, 4) : f32[s0, s1, 4]\n"
                           "%r = aten.slice_scatter(%x, %u, 2, 4, 8) : f32[s0, s1, 8]", B_P_8),
    "aten.gather": ("%u, %i = aten.topk(%x, 2) : f32[s0, s1, 2], i64[s0, s1, 2]\n"
                    "%r = aten.gather(%x, 2, %i) : f32[s0, s1, 2]", "[batch, positions, 2]"),
    "aten.scatter.value": ("%u, %i = aten.topk(%x, 2) : f32[s0, s1, 2], i64[s0, s1, 2]\n"
                           "%r = aten.scatter.value(%x, 2, %i, 1.0) : f32[s0, s1, 8]", B_P_8),
    "aten.scatter.src": ("%u, %i = aten.topk(%x, 2) : f32[s0, s1, 2], i64[s0, s1, 2]\n"
                         "%r = aten.scatter.src(%x, 2, %i, %u) : f32[s0, s1, 8]", B_P_8),
    "aten.scatter_add": ("%u, %i = aten.topk(%x, 2) : f32[s0, s1, 2], i64[s0, s1, 2]\n"
                         "%r = aten.scatter_add(%x, 2, %i, %u) : f32[s0, s1, 8]", B_P_8),
    "aten.one_hot": ("%r = aten.one_hot(%input_ids, 64) : i64[s0, s1, 64]", "[batch, positions, 64]"),
}  # fmt: skip
"""Operation -> a case and the label of %r."""

ORDER = "which is the order of all tokens, which is legal only as an index"
KEEPS = "keeps only a part of the positions"
PAIRS = "mixes tokens: it pairs elements along"
CUT = "across the boundaries of tokens"
THIRD = "%m = aten.gt.Scalar(%x, 0) : b8[s0, s1, 8]\n%z = aten.transpose.int(%x, 0, 1) : f32[s1, s0, 8]\n"
TOP = "%u, %i = aten.topk(%x, 2) : f32[s0, s1, 2], i64[s0, s1, 2]\n"

ILLEGAL: dict[str, tuple[str, str]] = {
    **{
        name: (ROUTED + f"%r = {name}(%order) : i64[2*s0*s1]", ORDER)
        for name in ("aten.contiguous", "aten.alias", "aten.detach", "aten.lift_fresh_copy", "aten.hardswish")
    },
    "aten._to_copy": (ROUTED + "%r = aten._to_copy(%order) {dtype = f16} : f16[2*s0*s1]", ORDER),
    "aten.to.dtype": (ROUTED + "%r = aten.to.dtype(%order, bf16) : bf16[2*s0*s1]", ORDER),
    "aten.type_as": (ROUTED + "%r = aten.type_as(%order, %x) : f32[2*s0*s1]", ORDER),
    "aten.clone": (ROUTED + "%i = aten.clone(%order) : i64[2*s0*s1]\n%r = aten.neg(%i) : i64[2*s0*s1]", ORDER),
    "aten.where.ScalarOther": (THIRD + "%r = aten.where.ScalarOther(%m, %z, 0.0) : f32[s0, s1, 8]", PAIRS),
    "aten.where.ScalarSelf": (THIRD + "%r = aten.where.ScalarSelf(%m, 0.0, %z) : f32[s0, s1, 8]", PAIRS),
    "aten.where.Scalar": (ROUTED + "%r = aten.where.Scalar(%order, 0.0, 1.0) : f32[2*s0*s1]", ORDER),
    "aten.masked_fill.Tensor": (THIRD + "%v = aten.zeros([]) : f32[]\n"
                                "%r = aten.masked_fill.Tensor(%z, %m, %v) : f32[s1, s0, 8]", PAIRS),
    "aten.floor_divide": (ROUTED + "%r = aten.floor_divide(%order, 3) : i64[2*s0*s1]",
                          "by 3, which is not the number of entries of a token"),
    "aten.floor_divide.Scalar": (ROUTED + "%r = aten.floor_divide.Scalar(%order, 2) : i64[2*s0*s1]", ORDER),
    "aten.div.Tensor_mode": (ROUTED + '%r = aten.div.Tensor_mode(%order, 2) {rounding_mode = "trunc"} : i64[2*s0*s1]',
                             "without rounding down"),
    "aten.polar": (THIRD + "%r = aten.polar(%x, %z) : c64[s0, s1, 8]", PAIRS),
    "aten.complex": (THIRD + "%r = aten.complex(%x, %z) : c64[s0, s1, 8]", PAIRS),
    "aten.dropout": ("%r = aten.dropout(%x, 0.5, true) : f32[s0, s1, 8]", "is in training mode"),
    "aten.sym_size.int": ("%r = aten.mul.Tensor(%x, %n1) : f32[s0, s1, 8]", "reads %n1, which is a size"),
    "aten.sym_numel": ("%n = aten.sym_numel(%x) : int(8*s0*s1)\n%r = aten.div.Tensor(%x, %n) : f32[s0, s1, 8]",
                       "reads %n, which is a size, which is legal only as a size"),
    **{
        f"aten.{name}": (f"%z = aten.{name}({args}) : f32[s1, 8]\n%s = aten.sum.dim_IntList(%z, [0]) : f32[8]\n"
                         "%r = aten.mul.Tensor(%x, %s) : f32[s0, s1, 8]", "sums over an axis of s1 elements")
        for name, args in {
            "zeros": "[%n1, 8]", "ones": "[%n1, 8]", "full": "[%n1, 8], 2.0", "empty.memory_format": "[%n1, 8]",
            "new_zeros": "%x, [%n1, 8]", "new_ones": "%x, [%n1, 8]", "new_full": "%x, [%n1, 8], 2.0",
            "new_empty": "%x, [%n1, 8]",
        }.items()
    },
    **{
        f"aten.{name}_like": (f"%z = aten.{name}_like(%x{fill}) : f32[s0, s1, 8]\n"
                              "%s = aten.sum.dim_IntList(%z, [1], true) : f32[s0, 1, 8]\n"
                              "%r = aten.mul.Tensor(%x, %s) : f32[s0, s1, 8]", "sums over an axis of s1 elements")
        for name, fill in {"zeros": "", "ones": "", "empty": "", "full": ", 2.0"}.items()
    },
    "aten.arange": ("%i = aten.arange(%n0) : i64[s0]\n%u = aten.view(%i, [-1, 1, 1]) : i64[s0, 1, 1]\n"
                    "%r = aten.add.Tensor(%x, %u) : f32[s0, s1, 8]", "numbers that count across tokens"),
    "aten.arange.start": ("%i = aten.arange.start(%n1, %nt) : i64[s0*s1 - s1]\n%r = aten.clone(%i) : i64[s0*s1 - s1]",
                          "starts or steps at a number that is not fixed"),
    "aten.arange.start_step": ("%n = core.mul(%n1, 2) : int(2*s1)\n"
                               "%r = aten.arange.start_step(0, %n, 2) : i64[s1]", "a number that is not fixed"),
    "aten.cumsum": ("%r = aten.cumsum(%x, 1) : f32[s0, s1, 8]", "aten.cumsum sums up the positions"),
    "aten.view": ("%r = aten.view(%c, [%n0, %n1, 8]) : f32[s0, s1, 8]", CUT),
    "aten.reshape": ("%r = aten.reshape(%c, [%n0, %n1, 4, 2]) : f32[s0, s1, 4, 2]", CUT),
    "aten._unsafe_view": ("%r = aten._unsafe_view(%x, [%n1, %n0, 8]) : f32[s1, s0, 8]", CUT),
    "aten.view_as": ("%u = aten.transpose.int(%x, 0, 1) : f32[s1, s0, 8]\n"
                     "%r = aten.view_as(%x, %u) : f32[s1, s0, 8]", CUT),
    "aten.flatten.using_ints": ("%u = aten.transpose.int(%x, 0, 1) : f32[s1, s0, 8]\n"
                                "%z = aten.flatten.using_ints(%u, 0, 1) : f32[s0*s1, 8]\n"
                                "%r = aten.add.Tensor(%t, %z) : f32[s0*s1, 8]", PAIRS),
    "aten.unflatten.int": ("%r = aten.unflatten.int(%t, 0, [%n1, %n0]) : f32[s1, s0, 8]", CUT),
    "aten.unsqueeze": ("%u = aten.unsqueeze(%x, 1) : f32[s0, 1, s1, 8]\n"
        "%v = aten.unsqueeze(%x, 2) : f32[s0, s1, 1, 8]\n"
                       "%r = aten.sub.Tensor(%u, %v) : f32[s0, s1, s1, 8]", "pairs each position with every other"),
    **{name: (ROUTED + f"%r = {name}(%order{args}) : i64[2*s0*s1]", ORDER)
       for name, args in {"aten.squeeze": "", "aten.squeeze.dim": ", 0", "aten.squeeze.dims": ", [0]"}.items()},
    "aten.t": ("%u = aten.t(%t) : f32[8, s0*s1]\n%r = aten.mm(%u, %t) : f32[8, 8]", "aten.mm sums over all tokens"),
    "aten.transpose.int": (THIRD + "%r = aten.add.Tensor(%x, %z) : f32[s0, s1, 8]", PAIRS),
    "aten.permute": ("%z = aten.permute(%x, [1, 0, 2]) : f32[s1, s0, 8]\n"
                     "%r = aten.add.Tensor(%x, %z) : f32[s0, s1, 8]", PAIRS),
    "aten.expand": (ROUTED + "%r = aten.expand(%order, [2, -1]) : i64[2, 2*s0*s1]", ORDER),
    "aten.copy": (ROUTED + "%r = aten.copy(%expert, %order) : i64[2*s0*s1]", ORDER),
    "aten.repeat": (ROUTED + "%r = aten.repeat(%sorted, [2, 1]) : f32[4*s0*s1, 8]", "aten.repeat repeats all tokens"),
    "aten.view_as_complex": ("%r = aten.view_as_complex(%c) : c64[s0, 8]", "joins pairs along the positions"),
    "aten.view_as_real": (ROUTED + "%u = aten.complex(%order, %order) : c64[2*s0*s1]\n"
                          "%r = aten.view_as_real(%u) : f32[2*s0*s1, 2]", ORDER),
    "aten.repeat_interleave.self_int": ("%r = aten.repeat_interleave.self_int(%x, 2, 0) : f32[2*s0, s1, 8]",
                                        "repeats the rows of the batch"),
    "aten.slice.Tensor": ("%r = aten.slice.Tensor(%x, 1, 1) : f32[s0, s1 - 1, 8]", KEEPS),
    "aten.select.int": ("%r = aten.select.int(%x, 1, -1) : f32[s0, 8]", "keeps only one of the positions"),
    "aten.split.Tensor": ("%r, %u = aten.split.Tensor(%x, 1, 1) : f32[s0, 1, 8], f32[s0, s1 - 1, 8]", KEEPS),
    "aten.split_with_sizes": ("%n = core.sub(%n1, 1) : int(s1 - 1)\n"
                              "%r, %u = aten.split_with_sizes(%x, [%n, 1], 1) : f32[s0, s1 - 1, 8], f32[s0, 1, 8]",
                              KEEPS),
    "aten.chunk": ("%r, %u = aten.chunk(%t, 2, 0) : f32[s1, 8], f32[s0*s1 - s1, 8]", "keeps only a part of the tokens"),
    "aten.unbind.int": ("%r, %u = aten.unbind.int(%x, 1) : f32[s0, 8], f32[s0, 8]", "keeps only one of the positions"),
    "aten.cat": ("%r = aten.cat([%x, %x], 1) : f32[s0, 2*s1, 8]", "puts more elements beside the positions"),
    "aten.stack": (THIRD + "%r = aten.stack([%x, %z], 0) : f32[2, s0, s1, 8]", PAIRS),
    "aten.flip": ("%r = aten.flip(%x, [1]) : f32[s0, s1, 8]", "moves elements along the positions"),
    "aten.roll": ("%r = aten.roll(%x, [1], [1]) : f32[s0, s1, 8]", "moves elements along the positions"),
    "aten.constant_pad_nd": ("%r = aten.constant_pad_nd(%x, [0, 0, 1, 0], 0) : f32[s0, s1 + 1, 8]",
                             "adds elements beside the positions"),
    "aten.slice_scatter": ("%u = aten.slice.Tensor(%x, 2, 0, 4) : f32[s0, s1, 4]\n"
                           "%r = aten.slice_scatter(%c, %c, 2) : f32[s0, 8, s1]", "replaces a part of the positions"),
    "aten.gather": (TOP + "%r = aten.gather(%x, 1, %i) : f32[s0, s1, 2]", "picks along the positions"),
    "aten.scatter.value": (TOP + "%r = aten.scatter.value(%x, 1, %i, 1.0) : f32[s0, s1, 8]",
                           "writes along the positions"),
    "aten.scatter.src": (TOP + "%r = aten.scatter.src(%x, 0, %i, %u) : f32[s0, s1, 8]",
                         "writes along the rows of the batch"),
    "aten.scatter_add": (TOP + "%r = aten.scatter_add(%x, 1, %i, %u) : f32[s0, s1, 8]", "writes along the positions"),
    "aten.one_hot": ("%r = aten.one_hot(%input_ids) : i64[s0, s1, s2]", "makes an axis of s2 elements"),
}  # fmt: skip
"""Operation -> a case that is not position-wise, or not as it is used, and a part of the reason."""


@pytest.mark.parametrize("name", LEGAL)
def test_a_position_wise_operation_has_a_label(name: str) -> None:
    check_legal(*LEGAL[name])


@pytest.mark.parametrize("name", ILLEGAL)
def test_an_operation_that_mixes_tokens_is_refused(name: str) -> None:
    check_refused(*ILLEGAL[name])


def test_every_row_has_both_cases() -> None:
    rows = {*ELEMENTWISE_RULES, *MOVES}
    assert rows <= set(LEGAL) and rows <= set(ILLEGAL)
    assert all(row.proof.endswith(".") for row in (*ELEMENTWISE_RULES.values(), *MOVES.values()))
