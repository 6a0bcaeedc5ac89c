"""Verifies a whole artefact and lists its faults, for `qcompiler check`."""

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qcompiler.artefact.folder import Folder, extra_files
from qcompiler.artefact.loading import (
    check_against,
    check_host,
    read_calibration,
    read_config,
    read_derivations,
    read_report,
    read_signature,
    read_stages,
    read_weights,
    reading,
)
from qcompiler.artefact.manifest import NAME, Manifest
from qcompiler.errors import ArtefactError, QCompilerError


@dataclass(frozen=True)
class Checked:
    """The result of checking an artefact.

    Attributes:
        path: The folder.
        manifest: The manifest; None if it cannot be read.
        files: File name -> its fault, or None.
        problems: All faults, one sentence each; empty if the artefact is as it was saved.
        extra: Files in the folder that the manifest does not list.
    """

    path: Path
    manifest: Manifest | None
    files: dict[str, str | None]
    problems: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the artefact is as it was saved and this qcompiler can read it."""
        return not self.problems

    def __str__(self) -> str:
        if self.manifest is None:
            return "\n".join(self.problems)
        manifest = self.manifest
        what = manifest.scheme if manifest.scheme is not None else f"the pipeline '{manifest.pipeline}'"
        made_by = ", ".join(f"{name} {version}" for name, version in manifest.made_by.items() if version)
        ranks = (
            "" if manifest.division is None else f" on {len(manifest.division.ranks)} ranks ({manifest.division.mesh})"
        )
        lines = [
            f"{self.path}: {what} for {manifest.target}{ranks}, by {made_by}",
            f"{len(self.files)} files, {manifest.nbytes} bytes, {len(manifest.stages)} stages",
            *(f"wrong: {problem}" for problem in self.problems),
            *(f"not a part of it: {name}" for name in self.extra),
        ]
        return "\n".join([*lines, *(["everything is as it was saved"] if self.ok else [])])


def check(folder: str | os.PathLike[str], *, trust: Collection[str] = ()) -> Checked:
    """Checks every byte of an artefact against the manifest, parses all stages, and regenerates the host module.

    Args:
        folder: The folder given to `save`.
        trust: As for `load`.

    Raises:
        ArtefactError: The folder does not exist. Faults inside it are returned instead.
    """
    path = Path(folder).resolve()
    if path.is_dir():
        try:
            with reading(path) as opened:
                return check_folder(opened, trust)
        except ArtefactError as error:
            return Checked(path, None, {NAME: str(error)}, (str(error),), ())
    with reading(path) as opened:
        return check_folder(opened, trust)


def check_folder(folder: Folder, trust: Collection[str] = ()) -> Checked:
    """Runs `check` on an open folder."""
    files = {NAME: None, **{name: _problem(partial(folder.verify, name)) for name in folder.manifest.files}}
    problems = tuple(problem for problem in files.values() if problem is not None)
    if not problems:
        problems = tuple(_contents(folder, trust))
    return Checked(folder.path, folder.manifest, files, problems, tuple(extra_files(folder)))


def _contents(folder: Folder, trust: Collection[str]) -> Iterator[str]:
    """Faults in the contents of files that match the manifest."""

    def everything() -> None:
        signature, _ = read_signature(folder)
        stages, graph = read_stages(folder, trust)
        for name in stages:
            stages[name].verify()
        check_against(folder, graph, signature, trust)
        read_derivations(folder, graph, trust)
        check_host(folder, graph, regenerate=False)
        division = folder.manifest.division
        for rank in range(len(division.ranks)) if division is not None else (None,):
            read_weights(folder, graph, rank)
        read_report(folder)
        read_config(folder)
        read_calibration(folder)

    if (problem := _problem(everything)) is not None:
        yield problem


def _problem(step: Callable[[], object]) -> str | None:
    try:
        step()
    except QCompilerError as error:
        return str(error)
    except Exception as error:  # any content of the files gives one sentence
        return f"{type(error).__name__}: {error}"
    return None
