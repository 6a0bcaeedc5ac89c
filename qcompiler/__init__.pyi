"""Public names and their modules, read by type checkers and by the lazy loader."""

from qcompiler import calibration as calibration
from qcompiler import checkpoints as checkpoints
from qcompiler import html as html
from qcompiler import numerics as numerics
from qcompiler import schemes as schemes
from qcompiler import testing as testing
from qcompiler.calibration import Calibration as Calibration
from qcompiler.compiler.compiling import compile as compile
from qcompiler.compiler.decoders import decoder as decoder
from qcompiler.compiler.loading import load as load
from qcompiler.compiler.model import CompiledModel as CompiledModel
from qcompiler.decoding.decoder import Decoder as Decoder
from qcompiler.diagnostics.attribution import attribute_error as attribute_error
from qcompiler.diagnostics.error_report import ErrorReport as ErrorReport
from qcompiler.diagnostics.nonfinite import NonFinite as NonFinite
from qcompiler.diagnostics.nonfinite import find_nonfinite as find_nonfinite
from qcompiler.distributed.simulation import simulated_mesh as simulated_mesh
from qcompiler.errors import ArtefactError as ArtefactError
from qcompiler.errors import CaptureError as CaptureError
from qcompiler.errors import CodegenError as CodegenError
from qcompiler.errors import InputError as InputError
from qcompiler.errors import ParseError as ParseError
from qcompiler.errors import PassError as PassError
from qcompiler.errors import QCompilerError as QCompilerError
from qcompiler.errors import VerifyError as VerifyError
from qcompiler.interpreter import interpret as interpret
from qcompiler.ir import DType as DType
from qcompiler.ir import Format as Format
from qcompiler.ir import Graph as Graph
from qcompiler.ir import Match as Match
from qcompiler.ir import Missed as Missed
from qcompiler.ir import Op as Op
from qcompiler.ir import Rewriter as Rewriter
from qcompiler.ir import Rule as Rule
from qcompiler.ir import TensorType as TensorType
from qcompiler.ir import Value as Value
from qcompiler.ir import diff as diff
from qcompiler.pass_manager import instruments as instruments
from qcompiler.pass_manager.pipeline import Effect as Effect
from qcompiler.pass_manager.pipeline import Pass as Pass
from qcompiler.pass_manager.pipeline import Pipeline as Pipeline
from qcompiler.report.report import Report as Report
from qcompiler.schemes.named import Scheme as Scheme
from qcompiler.schemes.named import list_schemes as list_schemes
from qcompiler.schemes.named import pipeline as pipeline
from qcompiler.schemes.tactics import Sharding as Sharding

__all__: list[str]
__version__: str
