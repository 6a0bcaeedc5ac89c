"""`qcompiler check`: verifies that an artefact is as it was saved and can be read here."""

import argparse
from pathlib import Path

from qcompiler.artefact.checking import check
from qcompiler.cli import exported
from qcompiler.cli.output import print_json
from qcompiler.program.exporters import exported_at


def run(options: argparse.Namespace) -> int:
    """Prints the result; returns 1 if the artefact has faults."""
    if (written := exported_at(Path(options.artefact))) is not None:
        return exported.check(written[1], options.json)
    found = check(options.artefact, trust=options.trust)
    if options.json:
        print_json({"artefact": str(found.path), "ok": found.ok, "problems": list(found.problems),
                    "files": found.files, "extra": list(found.extra)})  # fmt: skip
    else:
        print(found)
    return 0 if found.ok else 1
