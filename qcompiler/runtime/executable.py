"""A host module with its tensors: what runs when a compiled model is called."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import InputError, QCompilerError


class CompiledModule(torch.nn.Module):
    """The base of compiled models, by which lower layers recognize one."""


class HostWeights(torch.nn.Module):
    """The tensors that a host module reads, as buffers, so that they move and save with the compiled model.

    Args:
        names: Attribute -> name in `store`.
        store: Where the tensors are; it follows when they are moved, so that no tensor is held twice.
        device: Where they lie, and where the host module makes new tensors.
    """

    def __init__(self, names: Mapping[str, str], store: MutableMapping[str, Tensor], device: torch.device) -> None:
        super().__init__()
        self._names, self._store = dict(names), store
        self.device = device
        self.training = False
        for attribute, name in names.items():
            self.register_buffer(attribute, store[name].detach())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HostWeights":
        """Moves every tensor; refuses what would change an element type, since the host module is written for these."""
        moved: dict[int, Tensor] = {}
        for attribute, tensor in self._buffers.items():
            if tensor is None:
                continue
            new = moved.setdefault(id(tensor), fn(tensor))
            if new.dtype != tensor.dtype:
                raise QCompilerError(
                    "the element types of a compiled model are fixed",
                    got=f"{attribute} as {new.dtype}",
                    need=tensor.dtype,
                    fix="Convert the model before it is compiled.",
                )
        for attribute, tensor in self._buffers.items():
            if tensor is not None:
                self._buffers[attribute] = self._store[self._names[attribute]] = moved[id(tensor)]
        self.device = next((tensor.device for tensor in moved.values()), self.device)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Loads into new memory: what is not quantized is still shared with the model that was compiled."""
        for attribute, tensor in self._buffers.items():
            given = state_dict.get(f"{prefix}{attribute}")
            if tensor is not None and given is not None and given.shape == tensor.shape:
                self._buffers[attribute] = self._store[self._names[attribute]] = torch.empty_like(tensor)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def check_device(weights: HostWeights, captured_on: torch.device) -> None:
    """Raises InputError when the weights were moved away from the device that the model was compiled for."""
    if weights.device != captured_on:
        raise InputError(
            "the compiled model was moved to a device that it was not compiled for",
            got=weights.device,
            need=captured_on,
            fix=f'Move it back with .to("{captured_on}"), or compile the model on the other device.',
        )


def run_host(run: Callable[..., tuple[Any, ...]], weights: HostWeights, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The outputs of a host module: without gradients, and with the very element types that the graph says.

    Autocast would change those; under `torch.export` neither switch is thrown, because each would become a sub-graph.
    """
    if torch.compiler.is_exporting():
        return run(weights, *inputs)
    kind = weights.device.type
    with torch.no_grad():
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return run(weights, *inputs)
        return run(weights, *inputs)
