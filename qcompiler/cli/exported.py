"""What the commands know of a folder that an exporter wrote, such as one that IREE runs."""

import argparse
from pathlib import Path

from qcompiler.cli.output import print_json, print_table
from qcompiler.errors import InputError
from qcompiler.program.exporters import Exported, exported_at, exporter_called

GRAPHS = ("stage", "diff", "op", "source")


def inspect(name: str, found: Exported, options: argparse.Namespace) -> int:
    """Prints how the model is called; InputError if graphs are asked for."""
    if asked := [option for option in GRAPHS if getattr(options, option)]:
        raise InputError(f"{found.kind} holds no graphs", got=f"--{asked[0]}", fix=_keep(name))
    if options.json:
        print_json({name: found.document()})
        return 0
    print_table(["input", "type"], [*found.inputs().items()])
    print(*found.facts(), f"{found.folder}: {found.title()}: {found.runs}", sep="\n")
    return 0


def refuse(folder: str) -> None:
    """InputError for such a folder where an artefact is needed."""
    if (written := exported_at(Path(folder))) is not None:
        name, found = written
        problem = f"{found.kind} holds no graphs and no report"
        raise InputError(problem, got=folder, need="an artefact", fix=_keep(name))


def check(found: Exported, as_json: bool) -> int:
    """Prints whether the files are those that were written; 1 if they are not."""
    files = found.files()
    problems = [problem for problem in files.values() if problem is not None]
    extra = sorted(path.name for path in found.folder.iterdir() if path.name not in files)
    if as_json:
        print_json({"artefact": str(found.folder.resolve()), "ok": not problems, "problems": problems, "files": files,
                    "extra": extra})  # fmt: skip
    else:
        print(f"{found.folder}: {found.title()}")
        print("\n".join(f"wrong: {problem}" for problem in problems) or "everything is as it was written")
        print(*(f"not a part of it: {name}\n" for name in extra), sep="", end="")
    return 1 if problems else 0


def _keep(name: str) -> str:
    target = exporter_called(name).target
    without = f"compile without --target {target}, and " if target else ""
    return f"Keep an artefact: {without}make such a folder of it by export --to {name}."
