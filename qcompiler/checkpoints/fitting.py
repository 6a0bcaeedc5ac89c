"""Checks that the tensors of a checkpoint match the weights of the model one to one.

Float and quantized models are both checked. A surplus tensor may be the scale of a weight, so it is an error unless the
architecture itself ignores it.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn

from qcompiler.checkpoints.conversion import names_in_model
from qcompiler.checkpoints.declarations import unread
from qcompiler.checkpoints.reading import Checkpoint
from qcompiler.errors import QCompilerError

SHOWN = 5  # names that a message lists at most


def check_names(model: nn.Module, found: Collection[str], checkpoint: Checkpoint) -> None:
    """Raises QCompilerError unless the names found, converted to the model's, are the names of its weights.

    A weight that is tied to another one needs no tensor.
    """
    state = {*model.state_dict()}
    ties = ties_of(model)
    missing = {name for name in state - {*found} if not ties.get(name, {name}) & {*found}}
    check_complete(model, missing, {*found} - state, checkpoint)


def check_complete(
    model: nn.Module, missing: Iterable[str], surplus: Iterable[str], checkpoint: Checkpoint, other: Iterable[str] = ()
) -> None:
    """Raises QCompilerError for missing weights, surplus tensors, and tensors of the wrong shape.

    Args:
        model: The model; tensors that its class ignores are not surplus.
        missing: Weights of the model without a tensor.
        surplus: Tensors in the files without a weight.
        checkpoint: The checkpoint.
        other: Weights whose tensor has another shape, with both shapes.
    """
    advice = _unread(checkpoint)
    patterns = _ignored(model)
    surplus = [name for name in surplus if not any(re.search(pattern, name) for pattern in patterns)]
    for problem, names, fix in (
        ("the files lack weights of the model", missing, advice),
        ("weights have another shape in the files than in the model", other, advice),
        ("files have tensors that the model lacks", surplus, advice or _about_surplus(surplus, checkpoint)),
    ):
        if found := sorted(names):
            raise QCompilerError(problem, got=listed(found), where=str(checkpoint.folder), fix=fix)


def check_element_types(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raises QCompilerError if a floating-point weight has an integer tensor that is not declared as quantized."""
    tensors, state = checkpoint.tensors, model.state_dict()
    known = checkpoint.stored.keys() | checkpoint.beside
    integers = [name for name in tensors if name not in known and not tensors.dtype(name).is_floating_point]
    places = names_in_model(model, integers)
    wrong = [name for name in integers if places[name] in state and state[places[name]].is_floating_point()]
    if wrong:
        got = f"{str(tensors.dtype(wrong[0])).removeprefix('torch.')} in {listed(wrong)}"
        fix = _unread(checkpoint)
        raise QCompilerError(
            "weights of the model are integers in the files, and nothing declares how they are quantized",
            got=got,
            where=str(checkpoint.folder),
            fix=fix,
        )


def check_shape(name: str, wanted: Tensor | None, tensor: Tensor) -> None:
    """Raises QCompilerError unless a tensor has the shape of the weight that it replaces."""
    if wanted is None or wanted.shape != tensor.shape:
        need = "nothing" if wanted is None else list(wanted.shape)
        raise QCompilerError(f"'{name}' has another shape than in the model", got=list(tensor.shape), need=need)


def ties_of(model: nn.Module) -> dict[str, set[str]]:
    """Name of each tied weight -> all names tied to it, itself included."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    groups: dict[str, set[str]] = {}
    for target, source in tied.items():
        group = groups.get(target, {target}) | groups.get(source, {source})
        groups |= dict.fromkeys(group, group)
    return groups


def listed(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _ignored(model: nn.Module) -> list[str]:
    """Name patterns that the class of a model ignores, and two that transformers always ignores."""
    patterns = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return patterns


def _about_surplus(names: Iterable[str], checkpoint: Checkpoint) -> str:
    if any("scale" in name or "zero" in name or "offset" in name for name in names):
        return "They look like parts of quantized weights, in an unsupported format."
    if not checkpoint.config.get("architectures"):
        return "config.json names no architecture, so that the model has no head: add 'architectures'."
    if checkpoint.format is not None:
        return "They may change what the quantized weights mean, and their format is not supported."
    return "If they are not needed, load the model with transformers and compile that."


def _unread(checkpoint: Checkpoint) -> str | None:
    read = () if checkpoint.format is None else checkpoint.format.files
    return unread(checkpoint.folder, checkpoint.config, read)
