"""Targets: what a graph may be compiled for, and which one a model's own device asks for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qcompiler.errors import CodegenError, did_you_mean

AUTO = "auto"
CUDA = "cuda"
"""The target of the CUDA device that the model is on."""

HOPPER = (9, 0)
"""The compute capability that the kernels are written for."""


@dataclass(frozen=True)
class Target:
    """Where a compiled model runs.

    Attributes:
        name: What the user writes.
        device: Type of the torch device.
        doc: One sentence.
    """

    name: str
    device: str
    doc: str


TARGETS = {
    target.name: target
    for target in (
        Target("cpu", "cpu", "plain torch, with the numerics of the kernels"),
        Target("sm_90a", CUDA, "NVIDIA Hopper: Triton kernels on FP8 tensor cores"),
    )
}
TARGET_NAMES = (*TARGETS, CUDA, AUTO)
"""Everything that `target=` accepts."""

HOPPER_WORDS = ("gpu", "nvidia", "hopper", "h100", "h200", "h800", "h20", "gh200", "sm90", "sm_90", "sm90a", "triton")
"""What people write for the Hopper target."""


def check_target(name: str, known: Sequence[str] = TARGET_NAMES) -> None:
    """Raises CodegenError unless `name` is in `known`; whether the device can run the target is not checked."""
    if name in known:
        return
    if str(name).lower().partition(":")[0] in (CUDA, *HOPPER_WORDS):
        names = ", ".join(sorted(known))
        fix = f"Use target='cuda' for the GPU that the model is on, or 'sm_90a' for NVIDIA Hopper. Known: {names}."
    else:
        fix = did_you_mean(str(name), known)
    raise CodegenError("no such target", got=repr(name), fix=fix)


def target_for(name: str, device: torch.device) -> Target:
    """The target that `name` means for a model on `device`; "auto" and "cuda" depend on the device.

    Raises:
        CodegenError: The target is unknown, the device cannot run it, or nothing here runs FP8 on the device.
    """
    check_target(name)
    by_device = {target.device: target for target in TARGETS.values()}
    if device.type not in by_device:
        raise CodegenError(
            "no target runs on the model's device",
            got=device,
            need=" or ".join(by_device),
            fix=f'Move the model with .to("{TARGETS["cpu"].device}").',
        )
    target = by_device[{AUTO: device.type, CUDA: CUDA}[name]] if name in (AUTO, CUDA) else TARGETS[name]
    if target.device != device.type:
        raise CodegenError(
            f"the target {name} runs on {target.device}, but the model is on another device",
            got=device,
            need=target.device,
            fix=f'Move the model with .to("{target.device}"), or choose target="{AUTO}".',
        )
    if target.device == "cuda" and (capability := torch.cuda.get_device_capability(device)) != HOPPER:
        raise CodegenError(
            f"{torch.cuda.get_device_name(device)} cannot run the kernels of the target {target.name}",
            got=f"compute capability {capability[0]}.{capability[1]}",
            need=f"{HOPPER[0]}.{HOPPER[1]} (Hopper)",
            fix='Move the model to the CPU to compile it for target="cpu".',
        )
    return target
