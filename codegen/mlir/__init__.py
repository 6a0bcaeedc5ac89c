"""Graphs in MLIR, through torch-mlir: the torch dialect, or linalg on tensors."""

from codegen.mlir.converting import DIALECTS as DIALECTS
from codegen.mlir.converting import WEIGHTS as WEIGHTS
from codegen.mlir.converting import to_mlir as to_mlir
from codegen.mlir.interface import Parameter as Parameter
from codegen.mlir.interface import Result as Result
from codegen.mlir.module import MlirModule as MlirModule
