"""Commands on a folder that an exporter wrote, such as an IREE folder."""

import argparse
from pathlib import Path

from qcompiler.cli.output import print_json, print_table
from qcompiler.errors import InputError
from qcompiler.program.exporters import Exported, exported_at, exporter_called

GRAPHS = ("stage", "diff", "op", "source")


def inspect(name: str, found: Exported, options: argparse.Namespace) -> int:
    """Prints the model's signature. Raises InputError if graphs are requested."""
    if asked := [option for option in GRAPHS if getattr(options, option)]:
        raise InputError(f"{found.kind} has no graphs", got=f"--{asked[0]}", fix=_keep(name))
    if options.json:
        print_json({name: found.document()})
        return 0
    print_table(["input", "type"], [*found.inputs().items()])
    print(*found.facts(), f"{found.folder}: {found.title()}: {found.runs}", sep="\n")
    return 0


def refuse(folder: str) -> None:
    """Raises InputError for an exporter's folder where an artefact is needed."""
    if (written := exported_at(Path(folder))) is not None:
        name, found = written
        problem = f"{found.kind} has no graphs or report"
        raise InputError(problem, got=folder, need="an artefact", fix=_keep(name))


def check(found: Exported, as_json: bool) -> int:
    """Prints whether the files are unchanged; returns 1 if not."""
    files = found.files()
    problems = [problem for problem in files.values() if problem is not None]
    extra = sorted(path.name for path in found.folder.iterdir() if path.name not in files)
    if as_json:
        print_json({"artefact": str(found.folder.resolve()), "ok": not problems, "problems": problems, "files": files,
                    "extra": extra})  # fmt: skip
    else:
        print(f"{found.folder}: {found.title()}")
        print("\n".join(f"wrong: {problem}" for problem in problems) or "all files are unchanged")
        print(*(f"not a part of it: {name}\n" for name in extra), sep="", end="")
    return 1 if problems else 0


def _keep(name: str) -> str:
    target = exporter_called(name).target
    without = f"compile without --target {target}, and " if target else ""
    return f"Keep an artefact: {without}create this folder with export --to {name}."
