"""The targets of this distribution; importing this package registers them by name."""

from codegen.targets.cpu import CPU
from codegen.targets.hopper import HOPPER

__all__ = ["CPU", "HOPPER"]
