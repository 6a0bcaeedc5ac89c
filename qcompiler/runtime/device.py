"""Targets: what a graph may be compiled for, and which one a model's own device asks for."""

from dataclasses import dataclass

import torch

from qcompiler.errors import CodegenError, did_you_mean

AUTO = "auto"
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
        Target("sm_90a", "cuda", "NVIDIA Hopper: Triton kernels on FP8 tensor cores"),
    )
}


def check_target(name: str) -> None:
    """Raises CodegenError unless `name` is a target or "auto"; whether the device can run it is not asked."""
    if name not in (*TARGETS, AUTO):
        raise CodegenError("no such target", got=repr(name), fix=did_you_mean(str(name), [*TARGETS, AUTO]))


def target_for(name: str, device: torch.device) -> Target:
    """The target that `name` spells for a model on `device`; "auto" goes by the device.

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
    target = by_device[device.type] if name == AUTO else TARGETS[name]
    if target.device != device.type:
        raise CodegenError(
            f"the target {name} runs on {target.device}, but the model is elsewhere",
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
