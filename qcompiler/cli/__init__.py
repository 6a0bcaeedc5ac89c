"""The command line: one module per command."""

from qcompiler.cli.command_line import EXIT_CODES as EXIT_CODES
from qcompiler.cli.command_line import main as main
