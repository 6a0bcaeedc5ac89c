"""Schemes: named recipes, each a pipeline in text. Third parties add theirs through the entry point `qcompiler.schemes`."""

from dataclasses import dataclass
from importlib.metadata import entry_points

import passes  # noqa: F401  (to define a pass is to make it known)
from qcompiler import pass_manager
from qcompiler.errors import PassError, did_you_mean
from qcompiler.pass_manager import Pipeline


@dataclass(frozen=True)
class Scheme:
    """A named recipe.

    Attributes:
        name: What the user writes.
        doc: One sentence.
        pipeline: The passes, as text.
    """

    name: str
    doc: str
    pipeline: str


SCHEMES: dict[str, Scheme] = {}


def register(scheme: Scheme) -> Scheme:
    """Makes a scheme known by its name; PassError when the name is taken."""
    if SCHEMES.setdefault(scheme.name, scheme) != scheme:
        raise PassError("two schemes have one name", got=repr(scheme.name), need="a name that is free")
    return scheme


register(
    Scheme(
        "fp8_tile",
        "FP8 e4m3: activations in [1, 128] tiles, scaled in each call; weights in [128, 128] blocks, scaled once (DeepSeek-V3).",
        # canonicalize first: the others know one spelling of a matmul; dead-code before fp8-tile: the dead is not worth it
        "canonicalize; dead-code; fp8-tile; share-quantize; fuse-linear; fold-constants; dead-code; to-kernels",
    )
)


def pipeline(scheme: str) -> Pipeline:
    """The pipeline of a scheme, to run or to edit; PassError with did-you-mean when there is no such scheme."""
    if scheme not in SCHEMES:
        load_third_parties()
    if scheme not in SCHEMES:
        raise PassError("no such scheme", got=repr(scheme), fix=did_you_mean(scheme, SCHEMES))
    return Pipeline.parse(SCHEMES[scheme].pipeline)


def load_third_parties() -> None:
    """Imports what installed packages offer under the entry points `qcompiler.passes` and `qcompiler.schemes`.

    A pass is known once its module is imported. A scheme's entry point gives a `Scheme`.
    """
    for entry in entry_points(group="qcompiler.passes"):
        entry.load()
    for entry in entry_points(group="qcompiler.schemes"):
        register(entry.load())


pass_manager.finders.append(load_third_parties)
