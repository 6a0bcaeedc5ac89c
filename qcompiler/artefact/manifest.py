"""The manifest of an artefact: how it was made, and the size and hash of every other file."""

import hashlib
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qcompiler.artefact.strict_json import AGAIN, Node, canonical, parse, render
from qcompiler.artefact.weight_files import Written
from qcompiler.errors import ArtefactError
from qcompiler.program.folder_kinds import ARTEFACT

NAME = "manifest.json"
VERSION = 1
"""Format version; a larger one is from a newer qcompiler."""

SIGNATURE, REPORT, DERIVATIONS, HOST = "signature.json", "report.json", "derivations.json", "host.py"
CONFIG = "config.json"
CALIBRATION = "calibration.safetensors"
TOKENIZER = "tokenizer"
"""The folder for a decoder's tokenizer and generation configuration."""
FILE = re.compile(
    r"(signature|report|derivations|config)\.json|host\.py|stages/\d{2,}_[\w#-]+\.qir|"
    r"tokenizer/(\w+/)?\w[\w-]*\.(json|jinja|txt)|"
    r"(calibration|weights|weights-\d{5}-of-\d{5})\.safetensors"
)
"""Allowed file names; no other file is opened."""


@dataclass(frozen=True)
class Manifest:
    """The metadata of an artefact.

    Attributes:
        made_by: Versions of qcompiler, torch, triton and Python.
        scheme: The scheme as given; None if a pipeline was given.
        overrides: Schemes for some layers.
        pipeline: The passes that ran, as text.
        numerics: The profiles of the quantizations in the graph.
        target: The target of the host module.
        device: The device of the model and its inputs.
        source: SHA-256 of the host module.
        calibration: Digest of the calibration statistics; None if there was no calibration.
        stages: Name -> file, in order; the last stage runs.
        weights: The weight files.
        aliases: See `weight_files.Plan`.
        layouts: See `weight_files.Plan`.
        files: Every file except the manifest.
    """

    made_by: Mapping[str, str | None]
    scheme: str | None
    overrides: Mapping[str, str | None] | None
    pipeline: str
    numerics: tuple[str, ...]
    target: str
    device: str
    source: str
    calibration: str | None
    stages: Mapping[str, str]
    weights: tuple[str, ...]
    aliases: Mapping[str, str]
    layouts: Mapping[str, list[int]]
    files: Mapping[str, Written]

    @property
    def nbytes(self) -> int:
        """Total size in bytes of all files except the manifest."""
        return sum(file.size for file in self.files.values())


def versions() -> dict[str, str | None]:
    """Versions of qcompiler and its dependencies; None for a package that is not installed."""
    found: dict[str, str | None] = {"qcompiler": None, "torch": torch.__version__, "triton": None}
    for name in ("qcompiler", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, "python": platform.python_version()}


def write_manifest(manifest: Manifest) -> str:
    """The text of a manifest, which ends with the hash of its contents."""
    value: dict[str, Any] = {
        "format": ARTEFACT,
        "version": VERSION,
        "made_by": dict(manifest.made_by),
        "scheme": manifest.scheme,
        "overrides": None if manifest.overrides is None else dict(manifest.overrides),
        "pipeline": manifest.pipeline,
        "numerics": list(manifest.numerics),
        "target": manifest.target,
        "device": manifest.device,
        "source": manifest.source,
        "calibration": manifest.calibration,
        "stages": [{"name": name, "file": file} for name, file in manifest.stages.items()],
        "weights": {
            "files": list(manifest.weights),
            "aliases": dict(manifest.aliases),
            "layouts": dict(manifest.layouts),
        },
        "files": {name: {"size": file.size, "sha256": file.sha256} for name, file in manifest.files.items()},
    }
    return render(sealed(value))


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the hash of a manifest's contents, which reveals edits."""
    contents = {key: item for key, item in value.items() if key != "digest"}
    return {**contents, "digest": hashlib.sha256(canonical(contents)).hexdigest()}


def read_manifest(text: bytes, path: Path) -> Manifest:
    """Parses a manifest. Raises ArtefactError if it is foreign, newer, edited or damaged."""
    node = parse(text, path)
    if not isinstance(node.value, dict) or node.value.get("format") != ARTEFACT:
        raise ArtefactError(
            "this is not the manifest of an artefact", got=path, need=f'an object with "format": "{ARTEFACT}"'
        )
    if (found := node["version"].count()) > VERSION:
        made_by = node.value.get("made_by")
        raise ArtefactError(
            "the artefact is newer than this qcompiler",
            got=f"format version {found}, made by {made_by}",
            need=f"version {VERSION}",
            where=str(path),
            fix="Load it with the qcompiler that saved it, or a newer one.",
        )
    try:
        genuine = sealed(node.value)["digest"] == node["digest"].value
    except (ValueError, RecursionError):
        genuine = False
    if not genuine:
        raise ArtefactError("the manifest was edited: its digest does not match", got=path, fix=AGAIN)
    return _manifest(node)


def _manifest(node: Node) -> Manifest:
    files = {name: _file(name, entry) for name, entry in node["files"].members()}
    stages = {item["name"].text(): _listed(item["file"], files) for item in node["stages"].items()}
    overrides = node["overrides"]
    manifest = Manifest(
        made_by={name: _optional(value) for name, value in node["made_by"].members()},
        scheme=_optional(node["scheme"]),
        overrides=None if overrides.missing else {name: _optional(value) for name, value in overrides.members()},
        pipeline=node["pipeline"].text(),
        numerics=tuple(name.text() for name in node["numerics"].items()),
        target=node["target"].text(),
        device=node["device"].text(),
        source=node["source"].text(),
        calibration=_optional(node["calibration"]),
        stages=stages,
        weights=tuple(_listed(name, files) for name in node["weights"]["files"].items()),
        aliases={name: stored.text() for name, stored in node["weights"]["aliases"].members()},
        layouts={
            name: [axis.count() for axis in order.items()] for name, order in node["weights"]["layouts"].members()
        },
        files=files,
    )
    wanted = [SIGNATURE, REPORT, DERIVATIONS, HOST, *([CALIBRATION] if manifest.calibration is not None else [])]
    if not stages or not set(wanted) <= files.keys():
        node["files"].wrong(f"stages and {', '.join(wanted)}")
    if manifest.source != files[HOST].sha256:
        node["source"].wrong(f"the hash of {HOST}")
    return manifest


def _file(name: str, node: Node) -> Written:
    if FILE.fullmatch(name) is None:
        node.wrong("the name of a file that an artefact has")
    return Written(node["size"].count(), node["sha256"].text())


def _listed(node: Node, files: Mapping[str, Written]) -> str:
    return node.text() if node.text() in files else node.wrong("one of the files that are listed")


def _optional(node: Node) -> str | None:
    return None if node.missing else node.text()
