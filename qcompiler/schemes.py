"""Schemes: named recipes, each a pipeline in text.

Other distributions add theirs through the entry point `qcompiler.schemes`, whose name is the scheme's; it is loaded
when that name is asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import passes  # noqa: F401  (to define a pass is to make it known)
from qcompiler.errors import PassError, did_you_mean
from qcompiler.pass_manager import Pipeline, load, offered, shown

GROUP = "qcompiler.schemes"


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
"""The schemes that are known without asking other distributions, by name."""


def register(scheme: Scheme) -> Scheme:
    """Makes a scheme known by its name; PassError when the name is taken."""
    if SCHEMES.setdefault(scheme.name, scheme) != scheme:
        raise PassError("two schemes have one name", got=repr(scheme.name), need="a name that is free")
    return scheme


register(
    Scheme(
        "fp8_tile",
        "FP8 e4m3: activations in [1, 128] tiles, scaled in each call; weights in [128, 128] blocks, scaled once "
        "(DeepSeek-V3).",
        # canonicalize first: the others know one spelling of a matmul; dead-code early: the dead is not worth the work
        "canonicalize; dead-code; fp8-tile; share-quantize; fuse-linear; fold-constants; dead-code; to-kernels",
    )
)


def pipeline(scheme: str) -> Pipeline:
    """The pipeline of a scheme, to run or to edit; PassError with did-you-mean when there is no such scheme."""
    return Pipeline.parse(find(scheme).pipeline)


def find(name: str) -> Scheme:
    """The scheme called `name`; PassError with did-you-mean when there is none."""
    if name not in SCHEMES and (entry := offered(GROUP).get(name)) is not None:
        found = load(entry)
        if not isinstance(found, Scheme) or found.name != name:
            need = f"a qcompiler.Scheme called {name!r}"
            raise PassError("an entry point gives no scheme of its name", got=shown(entry), need=need)
        register(found)
    if name not in SCHEMES:
        raise PassError("no such scheme", got=repr(name), fix=did_you_mean(name, {*SCHEMES, *offered(GROUP)}))
    return SCHEMES[name]


def all_schemes() -> Mapping[str, Scheme | PassError]:
    """Every scheme, ours first, then those of other distributions; an error in the place of a broken one."""
    found: dict[str, Scheme | PassError] = dict(SCHEMES)
    for name in sorted({*offered(GROUP)} - {*found}):
        try:
            found[name] = find(name)
        except PassError as error:
            found[name] = error
    return found
