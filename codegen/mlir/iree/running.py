"""Loads a folder written by `build`, and calls its model with torch tensors."""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors

from codegen.mlir.extras import load as load_package
from codegen.mlir.iree.arrays import to_array, to_tensor
from codegen.mlir.iree.manifest import MODULE, WEIGHTS, Manifest, checked_bytes
from codegen.mlir.iree.manifest import read as read_manifest
from qcompiler.errors import CodegenError, InputError, did_you_mean
from qcompiler.ir import TensorType, parse_type
from qcompiler.ir.sizes import evaluate, symbols


class IreeModel:
    """A model compiled by IREE; call it with its inputs in order or by name.

    State that the model updates, such as a cache, persists between calls; updates of inputs are written to them.

    Attributes:
        manifest: The manifest of the folder.
    """

    def __init__(self, manifest: Manifest, binary: bytes, tensors: dict[str, torch.Tensor]) -> None:
        """Use `load`."""
        self.manifest = manifest
        self._types = {name: _parse_type(text) for name, text in manifest.inputs.items()}
        self._stored = {name: to_array(tensors[name]) for name in manifest.stored}
        runtime = load_package("iree.runtime", "iree")
        module = runtime.VmModule.copy_buffer(_config().vm_instance, binary)
        self._function = runtime.load_vm_module(module, _config())[manifest.function]

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The output, or a tuple of several.

        Raises:
            InputError: The inputs do not have the types that the model was compiled for.
            CodegenError: IREE failed to run it.
        """
        given = self._bound(inputs, named)
        self._check(given)
        arrays = [to_array(value) if isinstance(value, torch.Tensor) else value for value in given.values()]
        try:
            found = self._function(*arrays, *self._stored.values())
        except (RuntimeError, ValueError) as error:
            raise CodegenError("IREE failed to run the model", got=str(error).partition("\n")[0]) from error
        several = found if isinstance(found, Sequence) else (found,)
        results = [each.to_host() if hasattr(each, "to_host") else each for each in several]
        updates = self.manifest.updates
        for name, result in zip(updates, results[len(results) - len(updates) :], strict=True):
            if name in self._stored:
                self._stored[name] = result.copy()
            else:
                given[name].copy_(to_tensor(result))
        outputs = tuple(self._output(each, results) for each in self.manifest.outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}: {text}" for name, text in self.manifest.inputs.items())
        return f"<IreeModel @{self.manifest.function}({shown})>"

    def _bound(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """Name -> value, in order."""
        names = list(self.manifest.inputs)
        if unknown := [name for name in named if name not in names]:
            raise InputError("the model has no such input", got=unknown[0], fix=did_you_mean(unknown[0], names))
        given = dict(zip(names, inputs, strict=False)) | named
        if len(given) != len(names) or len(inputs) + len(named) != len(names):
            raise InputError("each input must be given exactly once", got=sorted(given), need=names)
        return {name: given[name] for name in names}

    def _check(self, given: dict[str, Any]) -> None:
        """Checks element types and shapes; equal symbols must have equal sizes within their limits."""
        sizes: dict[str, int] = {}
        for name, kind in self._types.items():
            if kind is None:
                continue
            found = TensorType.of(given[name])
            if found is None or found.dtype != kind.dtype or len(found.shape) != len(kind.shape):
                raise InputError(f"input '{name}' has the wrong type", got=found, need=kind)
            for want, got in zip(kind.shape, found.shape, strict=True):
                if str(want) in self.manifest.symbols:
                    sizes.setdefault(str(want), int(str(got)))
        for name, kind in self._types.items():
            shape = () if kind is None else kind.shape
            for axis, want in enumerate(shape):
                known = symbols(want) <= sizes.keys()
                if known and evaluate(want, sizes) != given[name].shape[axis]:
                    raise InputError(f"input '{name}' has the wrong shape", got=list(given[name].shape), need=kind)
        for symbol, size in sizes.items():
            low, high = self.manifest.symbols[symbol]
            if size < low or (high is not None and size > high):
                limits = f"{low}..{'' if high is None else high}"
                raise InputError("the model was not compiled for this size", got=f"{symbol} = {size}", need=limits)

    def _output(self, place: Any, results: list[Any]) -> Any:
        if "literal" in place:
            return place["literal"]
        result = results[place["result"]]
        return to_tensor(result) if hasattr(result, "dtype") else result


def load(folder: str | os.PathLike[str]) -> IreeModel:
    """Loads the model in a folder written by `build`; checks the hash of each file before using it.

    Raises:
        QCompilerError: IREE's runtime is not installed.
        InputError: The folder does not hold such a model, or one of its files has changed.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    binary, weights = (checked_bytes(path, name, manifest) for name in (MODULE, WEIGHTS))
    return IreeModel(manifest, binary, load_tensors(weights))


@cache
def _config() -> Any:
    """One device, with its threads, for all models of the process."""
    # Models may live until Python exits, which the bindings would report as a leak.
    load_package("iree.runtime._binding", "iree").disable_leak_checker()
    return load_package("iree.runtime", "iree").Config("local-task")


def _parse_type(text: str) -> TensorType | None:
    """The type for a type string of a manifest; None for a number, which is passed unchanged."""
    found = parse_type(text)
    return found if isinstance(found, TensorType) else None
