"""Targets: what a graph may be compiled for, and which one a model's own device asks for.

A target is a value, found by its name or by a device. Another distribution offers one under the entry point
`qcompiler.targets`:

    [project.entry-points."qcompiler.targets"]
    my-target = "my_package.my_target:MY_TARGET"
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TypeVar

import torch

from qcompiler.entry_points import load, offered, shown
from qcompiler.errors import CodegenError, did_you_mean
from qcompiler.ir import Format

AUTO = "auto"
CUDA = "cuda"
"""The target of the CUDA device that the model is on."""

GROUP = "qcompiler.targets"
"""The entry point of other distributions' targets."""

HOMES = ("codegen.targets",)
"""Packages that make targets known when they are imported."""


@dataclass(frozen=True)
class Target:
    """Where a compiled model runs, and what runs it. As it is, it runs any format with plain torch.

    Attributes:
        name: What the user writes.
        device: Type of the torch device.
        doc: What it is for, a colon, and what runs there.
        words: What else people write for it; they are told the name.
        kernels: The line of a host module that makes `kernels` known, which has the operators of `codegen.torch_ops`.
    """

    name: str
    device: str
    doc: str
    words: tuple[str, ...] = ()
    kernels: str = "kernels = torch.ops.qcompiler"

    def check(self, device: torch.device) -> None:
        """Raises CodegenError unless the target runs on the device."""
        if self.device != device.type:
            raise CodegenError(
                f"the target {self.name} runs on {self.device}, but the model is on another device",
                got=device,
                need=self.device,
                fix=f'Move the model with .to("{self.device}"), or choose target="{AUTO}".',
            )

    def why_not(self, x: Format, w: Format) -> str | None:
        """Why no kernel runs a scaled linear of such operands, in one sentence without a final stop, or None.

        Args:
            x: The format of the activation.
            w: The format of the weight, `[N, K]`.
        """
        return None


TargetType = TypeVar("TargetType", bound=Target)

_TARGETS: dict[str, Target] = {}


def register(target: TargetType) -> TargetType:
    """Makes a target known by its name; returns it."""
    _TARGETS[target.name] = target
    return target


def known_targets() -> dict[str, Target]:
    """The targets that are imported, by name."""
    for home in HOMES:
        import_module(home)
    return _TARGETS


def target_names() -> tuple[str, ...]:
    """Everything that `target=` accepts."""
    return (*{**known_targets(), **offered(GROUP)}, CUDA, AUTO)


def target_named(name: str) -> Target:
    """The target of that name; CodegenError when there is none."""
    if name not in known_targets() and (entry := offered(GROUP).get(name)) is not None:
        found = load(entry, CodegenError)
        if not isinstance(found, Target) or found.name != name:
            raise CodegenError("an entry point gives no target of its name", got=shown(entry), need=f"Target({name!r})")
        register(found)
    check_target(name, tuple(_TARGETS))
    return _TARGETS[name]


def check_target(name: str, known: Sequence[str] | None = None) -> None:
    """Raises CodegenError unless `name` is in `known`; whether the device can run the target is not checked.

    Args:
        name: What the user wrote.
        known: Names; left out, those that `target=` accepts.
    """
    known = target_names() if known is None else known
    if name in known:
        return
    word = str(name).lower().partition(":")[0]
    meant = next((target for target in known_targets().values() if word in (*target.words, target.device)), None)
    if meant is not None and meant.device == CUDA:
        names, what = ", ".join(sorted(known)), meant.doc.partition(":")[0]
        fix = f"Use target='{CUDA}' for the GPU that the model is on, or '{meant.name}' for {what}. Known: {names}."
    else:
        fix = did_you_mean(str(name), known)
    raise CodegenError("no such target", got=repr(name), fix=fix)


def target_for(name: str, device: torch.device) -> Target:
    """The target that `name` means for a model on `device`; "auto" and "cuda" depend on the device.

    Raises:
        CodegenError: The target is unknown, the device cannot run it, or nothing here runs FP8 on the device.
    """
    check_target(name)
    if name not in (AUTO, CUDA):
        target = target_named(name)
        target.check(device)
        return target
    refused: CodegenError | None = None
    for target in _of_type(device.type if name == AUTO else CUDA):
        try:
            target.check(device)
        except CodegenError as error:
            refused = refused or error
        else:
            return target
    if refused is not None:
        raise refused
    raise CodegenError(
        "no target runs on the model's device",
        got=device,
        need=" or ".join(dict.fromkeys(target.device for target in known_targets().values())),
        fix='Move the model with .to("cpu").',
    )


def _of_type(device: str) -> Iterator[Target]:
    """The targets of a type of device: first this distribution's, then others'."""
    yield from [target for target in known_targets().values() if target.device == device]
    rest = (target_named(name) for name in offered(GROUP) if name not in _TARGETS)
    yield from (target for target in rest if target.device == device)
