"""Calibration: collects and stores statistics of a graph's values on real inputs."""

from qcompiler.calibration.calibration import Calibration as Calibration
from qcompiler.calibration.coverage import Coverage as Coverage
from qcompiler.calibration.coverage import CoverageRow as CoverageRow
from qcompiler.calibration.statistics import OBSERVERS as OBSERVERS
from qcompiler.calibration.statistics import Statistics as Statistics
