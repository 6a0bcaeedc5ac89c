"""Capture: turns a PyTorch model into a `Graph` that is checked against the model."""

from qcompiler.capture.capturing import Captured as Captured
from qcompiler.capture.capturing import capture as capture
from qcompiler.capture.signature import Signature as Signature
