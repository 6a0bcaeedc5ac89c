"""The graph IR: types, operations, graphs, text form, verifier, and rewriting. Does not import torch."""

from qcompiler.ir.cache_type import CacheType
from qcompiler.ir.diff import diff
from qcompiler.ir.formats import ALL, Format
from qcompiler.ir.graph import Derivation, Graph
from qcompiler.ir.literals import parse_format, parse_literal, parse_type
from qcompiler.ir.op import Argument, Literal, Location, Op, Tag, Value, map_tree, print_argument, print_op
from qcompiler.ir.ranges import Range
from qcompiler.ir.rewrite import Match, Missed, Rewriter, Rule, apply_rules, explain
from qcompiler.ir.sharding import Mesh, Partial, Placement, Shard
from qcompiler.ir.sizes import Expr, Size, ceildiv, evaluate, parse_size, symbol
from qcompiler.ir.structure import Use
from qcompiler.ir.traits import Effects, Role
from qcompiler.ir.types import NONE, DType, NoneType, ScalarType, TensorType, Type
from qcompiler.text import legal_name

__all__ = [
    "ALL",
    "NONE",
    "Argument",
    "CacheType",
    "DType",
    "Derivation",
    "Effects",
    "Expr",
    "Format",
    "Graph",
    "Literal",
    "Location",
    "Match",
    "Mesh",
    "Missed",
    "NoneType",
    "Op",
    "Partial",
    "Placement",
    "Range",
    "Rewriter",
    "Role",
    "Rule",
    "ScalarType",
    "Shard",
    "Size",
    "Tag",
    "TensorType",
    "Type",
    "Use",
    "Value",
    "apply_rules",
    "ceildiv",
    "diff",
    "evaluate",
    "explain",
    "legal_name",
    "map_tree",
    "parse_format",
    "parse_literal",
    "parse_size",
    "parse_type",
    "print_argument",
    "print_op",
    "symbol",
]
