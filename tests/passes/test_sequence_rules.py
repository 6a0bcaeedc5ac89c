"""Tables along the sequence: reductions, matmuls, experts, quantization, attention. Each row has both cases."""

import pytest
import torch
from sequence_cases import (
    B_P_8,
    BLOCKS,
    GROUPS,
    HEADS,
    LAYOUT,
    PLACES,
    ROUTED,
    SORTED_TILES,
    TERMS,
    TILES,
    case,
    check_legal,
    check_refused,
)

from passes.analyses.sequence import Refused, analyze
from passes.analyses.sequence_collectives import COLLECTIVES
from passes.analyses.sequence_elementwise import ELEMENTWISE_RULES
from passes.analyses.sequence_moves import MOVES
from passes.analyses.sequence_rules import REFUSED, RULES, row_of
from qcompiler.interpreter import interpret

FEW, ONE, NONE = "[batch, positions, 2]", "[batch, positions, 1]", "[batch, positions]"
SORTED, ENTRIES = "[sorted, 8]", "[batch*positions*2, 8]"
MULTIPLIED = "%r = aten._grouped_mm(%sorted, %experts, %ends) : f32[2*s0*s1, 8]"
REPEATED = (
    '%experts = core.param() {name = "experts"} : f32[8, 8, 8]\n'
    "%copies = aten.repeat(%t, [8, 1]) : f32[8*s0*s1, 8]\n"
    "%q, %s = quant.quantize(%copies) {format = #fp8_tile} : f8e4m3fn[8*s0*s1, 8], f32[8*s0*s1, 1]\n"
    "%wq, %ws = quant.quantize(%experts) {format = #fp8_block} : f8e4m3fn[8, 8, 8], f32[8, 1, 1]\n"
)
MULTIPLIED_COPIES = f"%r = quant.grouped_linear(%q, %s, %wq, %ws, %ends) {LAYOUT} : f32[8*s0*s1, 8]"
MULTIPLIED_TILES = SORTED_TILES + f"%r = quant.grouped_linear(%q, %s, %wq, %ws, %ends) {LAYOUT} : f32[2*s0*s1, 8]"
TOKEN_TILES = "%q, %s = quant.quantize(%t) {format = #fp8_tile} : f8e4m3fn[s0*s1, 8], f32[s0*s1, 1]\n"
GATHERED = "%r, %z = kernel.gather_codes(%q, %s, %{}) {{format = #fp8_tile}} : f8e4m3fn[2*s0*s1, 8], f32[2*s0*s1, 1]"
CAUSAL = "%g = aten.transpose.int(%h, 1, 2) : f32[s0, 4, s1, 2]\n"

ZEROS = "#int8_row<symmetric = false>"

LEGAL: dict[str, tuple[str, str]] = {
    **{
        f"aten.{name}": (f"%r = aten.{name}(%x, [-1], true) : f32[s0, s1, 1]", ONE)
        for name in ("sum.dim_IntList", "mean.dim", "amax", "amin", "logsumexp")
    },
    **{f"aten.{name}.dim": (f"%r, %i = aten.{name}.dim(%h, 2) : f32[s0, s1, 2], i64[s0, s1, 2]", FEW)
       for name in ("max", "min")},
    **{f"aten.{name}": (f"%r = aten.{name}(%x, 2) : i64[s0, s1]", NONE) for name in ("argmax", "argmin")},
    "aten.prod.dim_int": ("%r = aten.prod.dim_int(%c, 1) : f32[s0, s1]", NONE),
    **{f"aten.{name}.dim": (f"%r = aten.{name}.dim(%x, 2) : b8[s0, s1]", NONE) for name in ("any", "all")},
    **{f"aten.{name}.correction": (f"%r = aten.{name}.correction(%x, [2]) {{correction = 0}} : f32[s0, s1]", NONE)
       for name in ("var", "std")},
    "aten.linalg_vector_norm": ("%r = aten.linalg_vector_norm(%x, 2, [-1]) : f32[s0, s1]", NONE),
    **{f"aten.{name}.int": (f"%r = aten.{name}.int(%x, -1) : f32[s0, s1, 8]", B_P_8)
       for name in ("softmax", "log_softmax")},
    "aten._softmax": ("%r = aten._softmax(%x, 2, false) : f32[s0, s1, 8]", B_P_8),
    "aten.cumprod": ("%r = aten.cumprod(%x, 2) : f32[s0, s1, 8]", B_P_8),
    "aten.topk": ("%r, %i = aten.topk(%x, 2) : f32[s0, s1, 2], i64[s0, s1, 2]", FEW),
    "aten.layer_norm": ("%r = aten.layer_norm(%x, [8]) : f32[s0, s1, 8]", B_P_8),
    "aten.native_layer_norm": ("%r, %m, %v = aten.native_layer_norm(%h, [4, 2], None, None, 1e-05) "
                               ": f32[s0, s1, 4, 2], f32[s0, s1, 1, 1], f32[s0, s1, 1, 1]", HEADS),
    "aten.rms_norm": ("%r = aten.rms_norm(%x, [8]) : f32[s0, s1, 8]", B_P_8),
    "aten.linear": ("%r = aten.linear(%x, %w) : f32[s0, s1, 8]", B_P_8),
    "aten.mm": ("%r = aten.mm(%t, %w) : f32[s0*s1, 8]", "[batch*positions, 8]"),
    "aten.bmm": ("%u = aten.expand(%t, [3, -1, -1]) : f32[3, s0*s1, 8]\n"
        "%v = aten.expand(%w, [3, -1, -1]) : f32[3, 8, 8]\n"
                 "%r = aten.bmm(%u, %v) : f32[3, s0*s1, 8]", "[3, batch*positions, 8]"),
    "aten.matmul": ("%r = aten.matmul(%w, %c) : f32[s0, 8, s1]", "[batch, 8, positions]"),
    "aten.addmm": ("%r = aten.addmm(%t, %t, %w) : f32[s0*s1, 8]", "[batch*positions, 8]"),
    "aten.baddbmm": ("%v = aten.view(%t, [-1, 4, 2]) : f32[s0*s1, 4, 2]\n"
        "%k = aten.view(%t, [-1, 2, 4]) : f32[s0*s1, 2, 4]\n"
                     "%z = aten.zeros([4]) : f32[4]\n%r = aten.baddbmm(%z, %v, %k) : f32[s0*s1, 4, 4]",
                     "[batch*positions, 4, 4]"),
    "aten.einsum": ('%r = aten.einsum("bpd,nd->npb", [%x, %w]) : f32[8, s1, s0]', "[8, positions, batch]"),
    "aten.embedding": ("%r = aten.embedding(%table, %p) : f32[s1, 8]", "[positions, 8]"),
    "aten.sort": (ROUTED + "%r = aten.neg(%sorted) : f32[2*s0*s1, 8]", SORTED),
    "aten.sort.stable": (ROUTED + "%k, %o = aten.sort.stable(%expert) {stable = true} : i64[2*s0*s1], i64[2*s0*s1]\n"
                         "%f = aten.floor_divide(%o, 2) : i64[2*s0*s1]\n"
                         "%r = aten.index.Tensor(%t, [%f]) : f32[2*s0*s1, 8]", SORTED),
    "aten.argsort": (ROUTED + "%back = aten.argsort(%order) : i64[2*s0*s1]\n"
                     "%r = aten.index.Tensor(%sorted, [%back]) : f32[2*s0*s1, 8]", ENTRIES),
    "aten.argsort.stable": ("%r = aten.argsort.stable(%x) {stable = true} : i64[s0, s1, 8]", B_P_8),
    "aten.floor_divide": (ROUTED + "%r = aten.clone(%sorted) : f32[2*s0*s1, 8]", SORTED),
    "aten.div.Tensor_mode": (ROUTED + '%f = aten.div.Tensor_mode(%order, 2) {rounding_mode = "floor"} : i64[2*s0*s1]\n'
                             "%r = aten.index.Tensor(%t, [%f]) : f32[2*s0*s1, 8]", SORTED),
    **{name: (ROUTED + f"%i = {name} : i64[2*s0*s1]\n%f = aten.floor_divide(%i, 2) : i64[2*s0*s1]\n"
              "%r = aten.index.Tensor(%t, [%f]) : f32[2*s0*s1, 8]", SORTED)
       for name in ("aten._to_copy(%order) {dtype = i64}", "aten.to.dtype(%order, i64)", "aten.clone(%order)")},
    "aten.histc": (ROUTED + GROUPS + MULTIPLIED, SORTED),
    "aten.cumsum": (ROUTED + GROUPS + MULTIPLIED, SORTED),
    "aten._grouped_mm": (ROUTED + GROUPS + MULTIPLIED, SORTED),
    "coll.own_rows": (ROUTED + GROUPS + "%first = aten.slice.Tensor(%ends, 0, 0, 3) : i32[3]\n"
                      "%r = coll.own_rows(%sorted, %first) : f32[2*s0*s1, 8]", SORTED),
    "aten.index.Tensor": (ROUTED + PLACES + "%r = aten.index.Tensor(%sorted, [%place]) : f32[2*s0*s1, 8]", ENTRIES),
    "aten.index.Tensor of a weight": (ROUTED + "%r = aten.index.Tensor(%w, [None, %key]) : f32[8, 2*s0*s1]",
                                      "[8, sorted]"),
    "aten.index_put": (ROUTED + "%z = aten.zeros_like(%t) : f32[s0*s1, 8]\n"
                       "%r = aten.index_put(%z, [%token], %sorted, true) : f32[s0*s1, 8]", "[batch*positions, 8]"),
    "aten.index_add": (ROUTED + "%r = aten.index_add(%t, 0, %token, %sorted) : f32[s0*s1, 8]", "[batch*positions, 8]"),
    **{f"{dialect}.quantize": (f"%r, %s = {dialect}.quantize(%x) {{format = #fp8_tile}} "
                               ": f8e4m3fn[s0, s1, 8], f32[s0, s1, 1]",
                               B_P_8) for dialect in ("quant", "kernel")},
    **{f"{dialect}.quantize_static": (
        '%a = core.param() {name = "a"} : f32[1, 1]\n'
        f"%r = {dialect}.quantize_static(%x, %a) {{format = #fp8_tensor}} : f8e4m3fn[s0, s1, 8]", B_P_8)
       for dialect in ("quant", "kernel")},
    "quant.dequantize(zero points)": (
        f"%q, %s, %z = quant.quantize(%x) {{format = {ZEROS}}} : i8[s0, s1, 8], f32[s0, s1, 1], i8[s0, s1, 1]\n"
        f"%r = quant.dequantize(%q, %s, None, %z) {{format = {ZEROS}, out_dtype = f32}} : f32[s0, s1, 8]", B_P_8),
    "quant.dequantize": (TILES + "%r = quant.dequantize(%q, %s) {format = #fp8_tile, out_dtype = f32} : f32[s0, s1, 8]",
                         B_P_8),
    **{name: (TILES + BLOCKS + f"%r = {name}(%q, %s, %wq, %ws) {LAYOUT} : f32[s0, s1, 8]", B_P_8)
       for name in ("quant.linear", "kernel.scaled_linear")},
    **{f"{dialect}.grouped_linear": (ROUTED + GROUPS + MULTIPLIED_TILES.replace("r = quant", f"r = {dialect}"), SORTED)
       for dialect in ("quant", "kernel")},
    "kernel.gather_codes": (ROUTED + TOKEN_TILES + GATHERED.format("token"), SORTED),
    "kernel.gather_codes(a table)": (
        '%u = core.param() {name = "w"} : f32[8, 8]\n%q, %s = quant.quantize(%u) {format = #fp8_tile} '
        ": f8e4m3fn[8, 8], f32[8, 1]\n%i = aten.argmax(%t, 1) : i64[s0*s1]\n"
        "%r, %z = kernel.gather_codes(%q, %s, %i) {format = #fp8_tile} : f8e4m3fn[s0*s1, 8], f32[s0*s1, 1]",
        "[batch*positions, 8]"),
    "quant.grouped_linear(equal groups)": (REPEATED + "%steps = aten.arange.start(1, 9) {dtype = i32} : i32[8]\n"
        f"%ends = aten.mul.Tensor(%steps, %nt) : i32[8]\n{MULTIPLIED_COPIES}", "[8*batch*positions, 8]"),
    "kernel.fused_quantize": (
        '%r, %s = kernel.fused_quantize(%x) {expression = "x0 * rsqrt(mean(x0 * x0) + 1e-06)", format = #fp8_tile, '
        "keep = []} : f8e4m3fn[s0, s1, 8], f32[s0, s1, 1]", B_P_8),
    "quant.sum_terms": (TERMS + "%r = quant.sum_terms(%q, %s) {format = #fp8_tile, out_dtype = f32} : f32[s0, s1, 8]",
                        B_P_8),
    "kernel.fused_sum_quantize": (
        TERMS + '%r, %z = kernel.fused_sum_quantize(%q, %s, %x) {expression = "x0 + y0 * mean(y0)", '
        "format = #fp8_tile, keep = [], term_format = #fp8_tile} : f8e4m3fn[s0, s1, 8], f32[s0, s1, 1]", B_P_8),
    "kernel.fused_linear": (TILES + BLOCKS + "%r = kernel.fused_linear(%q, %s, %wq, %ws, None, %x) "
                            '{expression = "x0 + y0", parts = 1, w_format = #fp8_block, x_format = #fp8_tile} '
                            ": f32[s0, s1, 8]", B_P_8),
    "attention.causal": (CAUSAL + "%r = attention.causal(%g, %g, %g) {scale = 0.5} : f32[s0, 4, s1, 2]",
                         "[batch, 4, positions, 2]"),
}  # fmt: skip
"""Operation, perhaps with arguments -> a case and the label of %r."""

POSITIONS = "the positions"
ROWS = "the rows of the batch"
STATIC = "is computed from all tokens, so later tokens change earlier results; use a scheme with a scale for each row"
TRANSPOSED = "%d = aten.transpose.int(%x, 0, 1) : f32[s1, s0, 8]\n"
TENSOR = "%q, %s = quant.quantize(%w) {format = #fp8_tensor} : f8e4m3fn[8, 8], f32[1, 1]\n"

ILLEGAL: dict[str, tuple[str, str]] = {
    **{f"aten.{name}": (f"%r = aten.{name}(%x, [1], true) : f32[s0, 1, 8]", POSITIONS)
       for name in ("sum.dim_IntList", "mean.dim", "amax", "amin", "logsumexp")},
    **{f"aten.{name}.dim": (f"%r, %i = aten.{name}.dim(%x, 0) : f32[s1, 8], i64[s1, 8]", ROWS)
       for name in ("max", "min")},
    **{f"aten.{name}": (f"%r = aten.{name}(%x, 1) : i64[s0, 8]", POSITIONS) for name in ("argmax", "argmin")},
    "aten.prod.dim_int": ("%r = aten.prod.dim_int(%t, 0) : f32[8]", "multiplies over all tokens"),
    **{f"aten.{name}.dim": (f"%r = aten.{name}.dim(%x, 1) : b8[s0, 8]", POSITIONS) for name in ("any", "all")},
    **{f"aten.{name}.correction": (f"%r = aten.{name}.correction(%x, [0, 2]) {{correction = 0}} : f32[s1]", ROWS)
       for name in ("var", "std")},
    "aten.linalg_vector_norm": ("%r = aten.linalg_vector_norm(%x) : f32[]", ROWS),
    **{f"aten.{name}.int": (f"%r = aten.{name}.int(%c, -1) : f32[s0, 8, s1]", f"normalizes over {POSITIONS}")
       for name in ("softmax", "log_softmax")},
    "aten._softmax": ("%r = aten._softmax(%x, 1, false) : f32[s0, s1, 8]", f"normalizes over {POSITIONS}"),
    "aten.cumprod": ("%r = aten.cumprod(%x, 1) : f32[s0, s1, 8]", f"multiplies up {POSITIONS}"),
    "aten.topk": ("%r, %i = aten.topk(%x, 2, 1) : f32[s0, 2, 8], i64[s0, 2, 8]", f"selects among {POSITIONS}"),
    "aten.layer_norm": ("%r = aten.layer_norm(%x, [%n1, 8]) : f32[s0, s1, 8]", f"normalizes over {POSITIONS}"),
    "aten.native_layer_norm": ("%r, %m, %v = aten.native_layer_norm(%c, [%n1], None, None, 1e-05) "
                               ": f32[s0, 8, s1], f32[s0, 8, 1], f32[s0, 8, 1]", f"normalizes over {POSITIONS}"),
    "aten.rms_norm": ("%r = aten.rms_norm(%c, [%n1]) : f32[s0, 8, s1]", f"normalizes over {POSITIONS}"),
    "aten.linear": ("%r = aten.linear(%t, %t) : f32[s0*s1, s0*s1]", "the operand 'weight' of aten.linear depends on"),
    "aten.mm": ("%u = aten.t(%t) : f32[8, s0*s1]\n%r = aten.mm(%u, %t) : f32[8, 8]", "sums over all tokens"),
    "aten.bmm": ("%r = aten.bmm(%c, %x) : f32[s0, 8, 8]", f"sums over {POSITIONS}"),
    "aten.matmul": ("%r = aten.matmul(%x, %c) : f32[s0, s1, s1]", "pairs each position with every other position"),
    "aten.addmm": ("%u = aten.t(%t) : f32[8, s0*s1]\n%z = aten.zeros([]) : f32[]\n"
                   "%r = aten.addmm(%z, %t, %u) : f32[s0*s1, s0*s1]", "pairs each row of the batch with every other"),
    "aten.baddbmm": (TRANSPOSED + "%b = aten.transpose.int(%d, 1, 2) : f32[s1, 8, s0]\n%z = aten.zeros([]) : f32[]\n"
                     "%r = aten.baddbmm(%z, %d, %b) : f32[s1, s0, s0]", "pairs each row of the batch"),
    "aten.einsum": ('%r = aten.einsum("bpd,bqd->bpq", [%x, %x]) : f32[s0, s1, s1]', "pairs each position"),
    "aten.embedding": ("%r = aten.embedding(%t, %input_ids) : f32[s0, s1, 8]", "the operand 'weight'"),
    "aten.sort": (ROUTED + "%r = aten.neg(%order) : i64[2*s0*s1]", "which is the order of all tokens"),
    "aten.sort.stable": ("%r, %i = aten.sort.stable(%x) {dim = 1, stable = true} : f32[s0, s1, 8], i64[s0, s1, 8]",
                         f"sorts {POSITIONS}"),
    "aten.argsort": ("%r = aten.argsort(%x, 0) : i64[s0, s1, 8]", f"sorts {ROWS}"),
    "aten.argsort.stable": (ROUTED + "%r = aten.argsort.stable(%token) {stable = true} : i64[2*s0*s1]",
                            "sorts an order that is not a permutation"),
    "aten.histc": (ROUTED + "%f = aten._to_copy(%expert) {dtype = f32} : f32[2*s0*s1]\n"
                   "%r = aten.histc(%f, 8, 0, 7) : f32[8]", "counts over all tokens"),
    "aten._grouped_mm": (ROUTED + GROUPS + "%u = aten.index.Tensor(%t, [%token]) : f32[2*s0*s1, 8]\n"
                         "%v = aten.neg(%count) : f32[8]\n%r = aten._grouped_mm(%u, %experts, %v) : f32[2*s0*s1, 8]",
                         "which is counts over all tokens"),
    "aten._grouped_mm in another order": (
        ROUTED + GROUPS + "%k, %o = aten.sort(%expert) : i64[2*s0*s1], i64[2*s0*s1]\n"
        "%f = aten.floor_divide(%o, 2) : i64[2*s0*s1]\n%u = aten.index.Tensor(%t, [%f]) : f32[2*s0*s1, 8]\n"
        "%r = aten._grouped_mm(%u, %experts, %ends) : f32[2*s0*s1, 8]", "are not in the order of its groups"),
    "coll.own_rows": (ROUTED + GROUPS + "%r = coll.own_rows(%t, %ends) : f32[s0*s1, 8]",
                      "not in the order of its groups"),
    "aten.slice.Tensor of groups": (ROUTED + GROUPS + "%r = aten.slice.Tensor(%ends, 0, 1) : i32[7]",
                                    "selects counts of other groups than the first ones"),
    "aten.index.Tensor": ("%r = aten.index.Tensor(%x, [None, %p]) : f32[s0, s1, 8]", f"picks among {POSITIONS}"),
    "aten.index_put": (ROUTED + "%z = aten.zeros_like(%t) : f32[s0*s1, 8]\n"
                       "%r = aten.index_put(%z, [%token], %sorted) : f32[s0*s1, 8]", "and keeps only one"),
    "aten.index_add": (ROUTED + "%z = aten.zeros_like(%w) : f32[8, 8]\n"
        "%r = aten.index_add(%z, 0, %key, %sorted) : f32[8, 8]",
                       "writes to rows that another token may choose"),
    **{f"{dialect}.quantize": (
        f"%r, %s = {dialect}.quantize(%x) {{format = #fp8_tensor}} : f8e4m3fn[s0, s1, 8], f32[1, 1]", STATIC)
       for dialect in ("quant", "kernel")},
    **{f"{dialect}.quantize_static": (
        "%m = aten.amax(%x, [2], true) : f32[s0, s1, 1]\n"
        f"%r = {dialect}.quantize_static(%x, %m) {{format = #fp8_row}} : f8e4m3fn[s0, s1, 8]", "the operand 'scale'")
       for dialect in ("quant", "kernel")},
    "quant.dequantize": (TILES + "%d = aten.transpose.int(%x, 0, 1) : f32[s1, s0, 8]\n"
                         "%a, %b = quant.quantize(%d) {format = #fp8_tile} : f8e4m3fn[s1, s0, 8], f32[s1, s0, 1]\n"
                         "%e = aten.view(%b, [%n0, %n1, 1]) : f32[s0, s1, 1]\n%r = quant.dequantize(%q, %e) "
                         "{format = #fp8_tile, out_dtype = f32} : f32[s0, s1, 8]", "mixes tokens"),
    **{name: (TILES + f"%d = aten.transpose.int(%q, 0, 1) : f8e4m3fn[s1, s0, 8]\n%e = aten.view(%s, [%n1, %n0, 1]) "
              f": f32[s1, s0, 1]\n{BLOCKS}%r = {name}(%d, %e, %wq, %ws) {LAYOUT} : f32[s1, s0, 8]", "mixes tokens")
       for name in ("quant.linear", "kernel.scaled_linear")},
    **{f"{dialect}.grouped_linear": (
        ROUTED + GROUPS + SORTED_TILES + "%all = aten.new_full(%count, [8], 1) {dtype = i32} : i32[8]\n"
        f"%r = {dialect}.grouped_linear(%q, %s, %wq, %ws, %all) {LAYOUT} : f32[2*s0*s1, 8]", "are not the ends of")
       for dialect in ("quant", "kernel")},
    "kernel.gather_codes": (
        ROUTED + TOKEN_TILES + GATHERED.format("order"), "picks rows in an order of other entries"),
    "kernel.fused_quantize": (
        '%r, %s = kernel.fused_quantize(%x) {expression = "x0 * 2.0", format = #fp8_tensor, keep = []} '
        ": f8e4m3fn[s0, s1, 8], f32[1, 1]", STATIC),
    "quant.sum_terms": (TERMS + "%d = aten.transpose.int(%e, 1, 2) : f32[2, s1, s0, 8]\n"
                        "%a, %b = quant.quantize(%d) {format = #fp8_tile} : f8e4m3fn[2, s1, s0, 8], f32[2, s1, s0, 1]\n"
                        "%f = aten.view(%b, [2, %n0, %n1, 1]) : f32[2, s0, s1, 1]\n"
                        "%r = quant.sum_terms(%q, %f) {format = #fp8_tile, out_dtype = f32} : f32[s0, s1, 8]",
                        "mixes tokens"),
    "kernel.fused_sum_quantize": (
        TERMS + '%r, %z = kernel.fused_sum_quantize(%q, %s) {expression = "y0", format = #fp8_tensor, keep = [], '
        "term_format = #fp8_tile} : f8e4m3fn[s0, s1, 8], f32[1, 1]", STATIC),
    "kernel.fused_linear": (TILES + BLOCKS + '%r, %z = kernel.fused_linear(%q, %s, %wq, %ws) {expression = "relu(y0)", '
                            "format = #fp8_tensor, parts = 1, w_format = #fp8_block, x_format = #fp8_tile} "
                            ": f8e4m3fn[s0, s1, 8], f32[1, 1]", STATIC),
    "attention.causal": ("%g = aten.transpose.int(%h, 1, 2) : f32[s0, 4, s1, 2]\n"
        "%f = aten.reshape(%g, [-1, 1, %n1, 2]) "
                         ": f32[4*s0, 1, s1, 2]\n%r = attention.causal(%f, %f, %f) {scale = 0.5} : f32[4*s0, 1, s1, 2]",
                         "is [batch*4, 1, positions, 2], not [batch, heads, positions, size]"),
    **{f"aten.{name}": (f"%u = aten.unsqueeze(%w, 2) : f32[8, 8, 1]\n%r = aten.{name}(%c, %u{args}) : f32[s0, 8, s1]",
                        f"aten.{name} convolves over {POSITIONS}")
       for name, args in {"conv1d": "", "conv1d.padding": "",
                          "convolution": ", None, [1], [0], [1], false, [0], 1"}.items()},
    "aten.conv2d": ("%u = aten.unsqueeze(%x, 1) : f32[s0, 1, s1, 8]\n"
        "%v = aten.view(%w, [8, 1, 1, 8]) : f32[8, 1, 1, 8]\n"
                    "%r = aten.conv2d(%u, %v) : f32[s0, 8, s1, 1]", f"convolves over {POSITIONS}"),
    "aten.scaled_dot_product_attention": (
        "%r = aten.scaled_dot_product_attention(%x, %x, %x) : f32[s0, s1, 8]",
        "reads all positions: the pass attention has not shown that its mask is causal"),
    **{f"aten.{name}": (f"%r = aten.{name}(%x) : f32[]", "combines all tokens")
       for name in ("sum", "mean", "max", "min", "any", "all")},
    "quant.grouped_linear(groups across tokens)": (
        REPEATED + "%steps = aten.arange.start(1, 9) {dtype = i32} : i32[8]\n"
        f"%ends = aten.mul.Tensor(%steps, %n1) : i32[8]\n{MULTIPLIED_COPIES}", "are not the ends of"),
    "quant.grouped_linear(shifted groups)": (
        REPEATED + "%steps = aten.arange.start(0, 8) {dtype = i32} : i32[8]\n"
        f"%ends = aten.mul.Tensor(%steps, %nt) : i32[8]\n{MULTIPLIED_COPIES}", "are not the ends of"),
    "core.buffer": ('%b = core.buffer() {name = "b"} : f32[8]\n%r = aten.add.Tensor(%x, %b) : f32[s0, s1, 8]',
                    "core.buffer reads a buffer"),
    "core.update": ('%b = core.buffer() {name = "b"} : f32[8]\n%v = aten.select.int(%x, 0, 0) : f32[s1, 8]\n'
                    "core.update(%b, %w)\n%r = aten.neg(%x) : f32[s0, s1, 8]", "a buffer"),
}  # fmt: skip
"""Operation -> a case that is not position-wise, and a part of the reason."""


MIXING: dict[str, str] = {
    "bidirectional attention": "%r = aten.scaled_dot_product_attention(%x, %x, %x) : f32[s0, s1, 8]",
    "the mean over positions": "%m = aten.mean.dim(%x, [1], true) : f32[s0, 1, 8]\n"
    "%r = aten.sub.Tensor(%x, %m) : f32[s0, s1, 8]",
    "the next token": "%r = aten.roll(%x, [-1], [1]) : f32[s0, s1, 8]",
    "backwards": "%r = aten.flip(%x, [1]) : f32[s0, s1, 8]",
    "other rows": "%r = aten.roll(%x, [1], [0]) : f32[s0, s1, 8]",
    "softmax over positions": "%r = aten.softmax.int(%x, 1) : f32[s0, s1, 8]",
    "a convolution": "%u = aten.view(%w, [8, 4, 2]) : f32[8, 4, 2]\n"
    "%d = aten.slice.Tensor(%c, 1, 0, 4) : f32[s0, 4, s1]\n"
    "%e = aten.constant_pad_nd(%d, [0, 1], 0) : f32[s0, 4, s1 + 1]\n"
    "%r0 = aten.conv1d(%e, %u) : f32[s0, 8, s1]\n%r = aten.transpose.int(%r0, 1, 2) : f32[s0, s1, 8]",
    "one scale for all tokens": "%y = aten.linear(%x, %w) : f32[s0, s1, 8]\n"
    "%q, %s = quant.quantize(%y) {format = #fp8_tensor} : f8e4m3fn[s0, s1, 8], f32[1, 1]\n"
    "%r = quant.dequantize(%q, %s) {format = #fp8_tensor, out_dtype = f32} "
    ": f32[s0, s1, 8]",
    "the sorted order": ROUTED + "%o = aten.view(%order, [%n0, %n1, 2]) : i64[s0, s1, 2]\n"
    "%r = aten.neg(%o) : i64[s0, s1, 2]",
    "a capacity of experts": ROUTED + "%i = aten.argsort(%order) : i64[2*s0*s1]\n"
    "%m = aten.lt.Scalar(%i, 6) : b8[2*s0*s1]\n"
    "%r = aten.view(%m, [%n0, %n1, 2]) : b8[s0, s1, 2]",
}
"""Graphs whose result at a token depends on later tokens or on other rows."""


@pytest.mark.parametrize("name", LEGAL)
def test_a_position_wise_operation_has_a_label(name: str) -> None:
    check_legal(*LEGAL[name], causal=name == "attention.causal")


@pytest.mark.parametrize("name", ILLEGAL)
def test_an_operation_that_mixes_tokens_is_refused(name: str) -> None:
    check_refused(*ILLEGAL[name])


@pytest.mark.parametrize("name", MIXING)
def test_what_is_refused_does_mix_tokens(name: str) -> None:
    graph, ids = case(MIXING[name]), torch.randint(0, 64, (2, 5))
    assert isinstance(analyze(graph), Refused)
    before = interpret(graph, [ids])[0]
    for token in range(64):
        changed = interpret(graph, [ids.index_put((torch.tensor([1]), torch.tensor([3])), torch.tensor([token]))])[0]
        if not torch.equal(before[0], changed[0]) or not torch.equal(before[1, :3], changed[1, :3]):
            return
    raise AssertionError("no earlier position and no other row changed")


def test_every_row_has_both_cases() -> None:
    elsewhere = {*ELEMENTWISE_RULES, *MOVES, *COLLECTIVES}
    elsewhere |= {"aten.div.Tensor_mode", "aten.clone", "transformers.grouped_mm_fallback"}
    assert {*RULES} - elsewhere - {*REFUSED} <= {name.split("(")[0] for name in LEGAL}
    assert {*RULES} - elsewhere <= {*ILLEGAL}
    assert all(row.proof.endswith(".") for row in RULES.values())


def test_an_unknown_operation_is_refused() -> None:
    check_refused(
        "%r = aten.cummax(%x, 2) : f32[s0, s1, 8]", "aten.cummax is not known to treat each position by itself"
    )
    assert row_of("aten.cummax") is None and row_of("aten.gelu") is not None
