"""`python -m qcompiler`: the command line."""

import sys

from qcompiler.cli import main

if __name__ == "__main__":
    sys.exit(main())
