"""The executable form of a compiled model: a host module with its tensors."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import InputError, QCompilerError


class CompiledModule(torch.nn.Module):
    """The base class of compiled models, by which lower layers recognize them."""


class HostWeights(torch.nn.Module):
    """The tensors of a host module as buffers, so that they move and save with the compiled model.

    Args:
        names: Attribute -> name in `store`.
        store: The source of the tensors; updated when they move, so that no tensor is held twice.
        device: The device of the tensors, on which the host module also creates new ones.
        caches: Attribute -> the tensors of a key-value cache, which are neither moved nor saved.
    """

    def __init__(
        self,
        names: Mapping[str, str],
        store: MutableMapping[str, Tensor],
        device: torch.device,
        caches: Mapping[str, list[Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.__dict__.update(caches or {})
        self._names, self._store = dict(names), store
        self.device = device
        self.training = False
        for attribute, name in names.items():
            self.register_buffer(attribute, store[name].detach())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HostWeights":
        """Moves every tensor; rejects dtype changes, because the host module is generated for fixed dtypes."""
        moved: dict[int, Tensor] = {}
        for attribute, tensor in self._buffers.items():
            if tensor is None:
                continue
            new = moved.setdefault(id(tensor), fn(tensor))
            if new.dtype != tensor.dtype:
                raise QCompilerError(
                    "the dtypes of a compiled model are fixed",
                    got=f"{attribute} as {new.dtype}",
                    need=tensor.dtype,
                    fix="Convert the model before compiling it.",
                )
        for attribute, tensor in self._buffers.items():
            if tensor is not None:
                self._buffers[attribute] = self._store[self._names[attribute]] = moved[id(tensor)]
        self.device = next((tensor.device for tensor in moved.values()), self.device)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Loads into new memory: tensors that are not quantized share memory with the original model."""
        for attribute, tensor in self._buffers.items():
            given = state_dict.get(f"{prefix}{attribute}")
            if tensor is not None and given is not None and given.shape == tensor.shape:
                self._buffers[attribute] = self._store[self._names[attribute]] = torch.empty_like(tensor)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def check_device(weights: HostWeights, captured_on: torch.device) -> None:
    """Raises InputError if the weights have moved off the device that the model was compiled for."""
    if weights.device != captured_on:
        raise InputError(
            "the compiled model was moved off the device that it was compiled for",
            got=weights.device,
            need=captured_on,
            fix=f'Move it back with .to("{captured_on}"), or compile the model on the other device.',
        )


def run_host(run: Callable[..., tuple[Any, ...]], weights: HostWeights, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Runs a host module without gradients, and with exactly the dtypes of the graph.

    Autocast would change dtypes. Under `torch.export` neither switch is set, because each would become a sub-graph.
    """
    if torch.compiler.is_exporting():
        return run(weights, *inputs)
    kind = weights.device.type
    with torch.no_grad():
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return run(weights, *inputs)
        return run(weights, *inputs)
