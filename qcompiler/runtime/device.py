"""Targets: what a graph is compiled for, and how a model's device selects one.

A target is a value, found by name or by device. Ours are the modules of `codegen.targets`. Another distribution
provides one under the entry point `qcompiler.targets`:

    [project.entry-points."qcompiler.targets"]
    my-target = "my_package.my_target:MY_TARGET"
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from qcompiler.entry_points import import_modules, load, offered, shown
from qcompiler.errors import CodegenError, InputError, did_you_mean
from qcompiler.ir import Format

AUTO = "auto"
CUDA = "cuda"
"""Selects the target of the CUDA device that the model is on."""

GROUP = "qcompiler.targets"
"""The entry point for targets of other distributions."""

HOME = "codegen.targets"
"""The package whose modules register targets when they are imported."""


@dataclass(frozen=True)
class Target:
    """Where and how a compiled model runs. This base class runs any format with plain torch.

    Attributes:
        name: The name that the user writes.
        device: The torch device type.
        doc: What the target is for, a colon, and what runs there.
        words: Other names that users may write; the error suggests the right name.
        kernels: The line of a host module that defines `kernels`, the namespace with the operators of
            `codegen.torch_ops`.
        passes: Passes that prepare a graph for its kernels, as text; they run after all others.
    """

    name: str
    device: str
    doc: str
    words: tuple[str, ...] = ()
    kernels: str = "kernels = torch.ops.qcompiler"
    passes: str = ""

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
        """Returns why no kernel runs a scaled linear with these formats, a sentence without final period; or None.

        Args:
            x: The format of the activation.
            w: The format of the weight, `[N, K]`.
        """
        return None


TargetType = TypeVar("TargetType", bound=Target)

_TARGETS: dict[str, Target] = {}


def register(target: TargetType) -> TargetType:
    """Registers a target by name and returns it."""
    _TARGETS[target.name] = target
    return target


def known_targets() -> dict[str, Target]:
    """Returns the imported targets, by name."""
    import_modules(HOME)
    return _TARGETS


def target_names() -> tuple[str, ...]:
    """Returns all names that `target=` accepts."""
    return (*{**known_targets(), **offered(GROUP)}, CUDA, AUTO)


def target_named(name: str) -> Target:
    """Returns the target of that name; CodegenError if there is none."""
    if name not in known_targets() and (entry := offered(GROUP).get(name)) is not None:
        found = load(entry, CodegenError)
        if not isinstance(found, Target) or found.name != name:
            raise CodegenError("an entry point does not provide its target", got=shown(entry), need=f"Target({name!r})")
        register(found)
    check_target(name, tuple(_TARGETS))
    return _TARGETS[name]


def check_target(name: str, known: Sequence[str] | None = None) -> None:
    """Raises CodegenError unless `name` is in `known`; does not check whether the device can run the target.

    Args:
        name: The user's argument.
        known: Accepted names; by default those that `target=` accepts.
    """
    known = target_names() if known is None else known
    if name in known:
        return
    word = str(name).lower().partition(":")[0]
    meant = next((target for target in known_targets().values() if word in (*target.words, target.device)), None)
    if meant is not None and meant.device == CUDA:
        names, what = ", ".join(sorted(known)), meant.doc.partition(":")[0]
        fix = f"Use target='{CUDA}' for the model's GPU, or '{meant.name}' for {what}. Known: {names}."
    else:
        fix = did_you_mean(str(name), known)
    raise CodegenError("no such target", got=repr(name), fix=fix)


def check_device(device: "torch.device | str | None") -> None:
    """Raises InputError if torch does not know the device, or does not find such a GPU."""
    try:
        found = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise InputError("there is no such device", got=repr(device), need='"cpu" or "cuda"') from error
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == CUDA and (found.index or 0) >= gpus:
        raise InputError("torch does not find the device", got=repr(str(device)), need='"cpu", or "cuda" with a GPU')


def target_for(name: str, device: torch.device) -> Target:
    """Returns the target that `name` means for a model on `device`; "auto" and "cuda" depend on the device.

    Raises:
        CodegenError: The target is unknown, the device cannot run it, or no target runs FP8 on the device.
    """
    check_target(name)
    if name not in (AUTO, CUDA):
        target = target_named(name)
        target.check(device)
        return target
    refused: CodegenError | None = None
    for target in targets_on(device.type if name == AUTO else CUDA):
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
        need=" or ".join(sorted({target.device for target in known_targets().values()})),
        fix='Move the model with .to("cpu").',
    )


def targets_on(device: str) -> Iterator[Target]:
    """Yields the targets of a device type: first this distribution's, then others'."""
    yield from [target for target in known_targets().values() if target.device == device]
    rest = (target_named(name) for name in offered(GROUP) if name not in _TARGETS)
    yield from (target for target in rest if target.device == device)
