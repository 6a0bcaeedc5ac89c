"""Schemes: named quantization specs, their pipelines, and hints for names from other tools."""

from qcompiler.schemes.named import Options as Options
from qcompiler.schemes.named import Scheme as Scheme
from qcompiler.schemes.named import list_schemes as list_schemes
from qcompiler.schemes.named import pipeline as pipeline
from qcompiler.schemes.named import register as register
