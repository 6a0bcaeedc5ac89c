"""docs/cli.md: its reference equals the parser's help.

`QCOMPILER_UPDATE=1 pytest tests/cli/test_reference.py` rewrites it; a person reads the diff.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcompiler import knobs
from qcompiler.cli import EXIT_CODES
from qcompiler.cli.parser import COMMANDS, build_parser

BEGIN, END = "<!-- from here on as the parser has it -->\n", "<!-- as far as the parser has it -->\n"
EVERYWHERE = ("--help", "--debug")


def reference() -> str:
    """The part of the page that is generated."""
    parser = build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    lines = ["## Exit codes", "", "| code | meaning |", "| --- | --- |"]
    lines += [f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()]
    for name, command in commands.choices.items():
        lines += ["", f"## qcompiler {name}", "", command.description or "", *rows(command)]
    return "\n".join([*lines, ""])


def rows(command: argparse.ArgumentParser) -> Iterator[str]:
    """One row an argument; without what every command has."""
    shown = [action for action in command._actions if not set(EVERYWHERE) & set(action.option_strings)]
    yield from ["", "| argument | meaning |", "| --- | --- |"] if shown else []
    for action in shown:
        needed = " (needed)" if action.required and action.option_strings else ""
        yield f"| {spelled(action)}{needed} | {(action.help or '').replace('|', chr(92) + '|')} |"


def spelled(action: argparse.Action) -> str:
    """`--output`, `-o` DIR"""
    metavars = (action.metavar,) if isinstance(action.metavar, str) else action.metavar or ()
    if not action.option_strings:
        return f"`{metavars[0] if metavars else '|'.join(action.choices or [action.dest])}`".replace("|", "\\|")
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    takes = "" if action.nargs == 0 else " ".join(metavars) or action.dest.upper()
    return f"{names} {takes}".rstrip()


def test_the_reference_is_what_the_parser_says(root: Path) -> None:
    path = root / "docs" / "cli.md"
    page = path.read_text(encoding="utf-8")
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    assert begin and end
    today = f"{head}{BEGIN}\n{reference()}\n{END}{tail}"
    if knobs.current().update:
        path.write_text(today, encoding="utf-8")
    else:
        assert today == page


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        build_parser().parse_args([command, "--help"])
    assert status.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: qcompiler {command} ")
