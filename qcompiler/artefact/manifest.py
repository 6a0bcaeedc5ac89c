"""The manifest of an artefact: how it was made, and the size and hash of every other file."""

import hashlib
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qcompiler.artefact.strict_json import AGAIN, Node, canonical, parse, render
from qcompiler.artefact.weight_files import Written
from qcompiler.errors import ArtefactError, QCompilerError
from qcompiler.ir import Mesh
from qcompiler.program.folder_kinds import ARTEFACT

NAME = "manifest.json"
VERSION, SHARDED = 1, 2
"""Format version of the artefact of a whole model, and of a sharded one; a larger one is from a newer qcompiler."""

SIGNATURE, REPORT, DERIVATIONS, HOST = "signature.json", "report.json", "derivations.json", "host.py"
CONFIG = "config.json"
CALIBRATION = "calibration.safetensors"
TOKENIZER = "tokenizer"
"""The folder for a decoder's tokenizer and generation configuration."""
FILE = re.compile(
    r"(signature|report|derivations|config)\.json|host\.py|stages/\d{2,}_[\w#-]+\.qir|"
    r"tokenizer/(\w+/)?\w[\w-]*\.(json|jinja|txt)|"
    r"calibration\.safetensors|(rank-\d{5}/)?(weights|weights-\d{5}-of-\d{5})\.safetensors"
)
"""Allowed file names; no other file is opened."""


@dataclass(frozen=True)
class Stored:
    """The weights of a program.

    Attributes:
        files: The weight files.
        aliases: See `weight_files.Plan`.
        layouts: See `weight_files.Plan`.
    """

    files: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Division:
    """The weights of a sharded model.

    Attributes:
        mesh: The mesh, as text.
        sharding: How the model is divided.
        save: A name that the weight files of one save have in their headers.
        ranks: The weights of each rank.
    """

    mesh: str
    sharding: str
    save: str
    ranks: tuple[Stored, ...]


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
        weights: The weights; empty for a sharded model.
        files: Every file except the manifest.
        division: The weights of a sharded model; everything else belongs to its rank 0.
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
    weights: Stored
    files: Mapping[str, Written]
    division: Division | None = None

    def weights_of(self, rank: int | None) -> Stored:
        """The weights of a rank; None for a model that is not sharded."""
        return self.weights if rank is None or self.division is None else self.division.ranks[rank]

    @property
    def digest(self) -> str:
        """A hash of all other files."""
        return hashlib.sha256("".join(file.sha256 for file in self.files.values()).encode()).hexdigest()

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
    division = manifest.division
    value: dict[str, Any] = {
        "format": ARTEFACT,
        "version": VERSION if division is None else SHARDED,
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
        "weights": stored_to_json(manifest.weights),
        "files": {name: {"size": file.size, "sha256": file.sha256} for name, file in manifest.files.items()},
    }
    if division is not None:
        ranks = [stored_to_json(each) for each in division.ranks]
        value["division"] = {"mesh": division.mesh, "sharding": division.sharding, "save": division.save,
                             "ranks": ranks}  # fmt: skip
    return render(sealed(value))


def is_weights(name: str) -> bool:
    """Whether a file holds weights."""
    return name.rpartition("/")[2].startswith("weights")


def stored_to_json(stored: Stored) -> dict[str, Any]:
    """The entry of a manifest for the weights of a program."""
    return {"files": list(stored.files), "aliases": dict(stored.aliases), "layouts": dict(stored.layouts)}


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
    if (found := node["version"].count()) > SHARDED:
        made_by = node.value.get("made_by")
        raise ArtefactError(
            "the artefact is newer than this qcompiler",
            got=f"format version {found}, made by {made_by}",
            need=f"version {SHARDED}",
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
        weights=_stored(node["weights"], files),
        files=files,
        division=_division(node["division"], files) if node["version"].count() == SHARDED else None,
    )
    wanted = [SIGNATURE, REPORT, DERIVATIONS, HOST, *([CALIBRATION] if manifest.calibration is not None else [])]
    if not stages or not set(wanted) <= files.keys():
        node["files"].wrong(f"stages and {', '.join(wanted)}")
    if manifest.source != files[HOST].sha256:
        node["source"].wrong(f"the hash of {HOST}")
    return manifest


def _stored(node: Node, files: Mapping[str, Written]) -> Stored:
    return Stored(
        tuple(_listed(name, files) for name in node["files"].items()),
        {name: stored.text() for name, stored in node["aliases"].members()},
        {name: [axis.count() for axis in order.items()] for name, order in node["layouts"].members()},
    )


def _division(node: Node, files: Mapping[str, Written]) -> Division:
    ranks = tuple(_stored(each, files) for each in node["ranks"].items())
    mesh = node["mesh"].text()
    try:
        size = Mesh.parse(mesh).size
    except QCompilerError:
        size = 0
    if size != len(ranks):
        node["mesh"].wrong(f"a mesh of {len(ranks)} ranks")
    return Division(mesh, node["sharding"].text(), node["save"].text(), ranks)


def _file(name: str, node: Node) -> Written:
    if FILE.fullmatch(name) is None:
        node.wrong("the name of a file that an artefact has")
    return Written(node["size"].count(), node["sha256"].text())


def _listed(node: Node, files: Mapping[str, Written]) -> str:
    return node.text() if node.text() in files else node.wrong("one of the files that are listed")


def _optional(node: Node) -> str | None:
    return None if node.missing else node.text()
