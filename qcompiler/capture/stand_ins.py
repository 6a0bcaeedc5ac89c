"""Stand-ins for weights that are read later: tensors of equal shapes that share one random buffer.

Capture runs the model and compares the graph with it, at several sizes. A rank of a mesh must not hold the whole
weights for that, and any numbers will do:

    model.layers.0.mlp.up_proj.weight  =  a view of the buffer    its values are not the checkpoint's
    graph.weights["model.layers.0.mlp.up_proj.weight"]            reads the file: of it, or of a part of it

The buffer is as large as the largest of the weights, and is freed with the model. `capture` puts the sources, which
read the files, into the graph's weights store.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from qcompiler.errors import QCompilerError
from qcompiler.runtime.weights import Source, named_tensors

_SOURCES = "_qcompiler_sources"

PERIOD = 1 << 20
"""Different numbers in a buffer, which repeats them."""

STEP = 1 << 12
"""Elements from the place of one stand-in to the next: equal weights would hide that the graph confuses them."""


def stand_in(model: nn.Module, sources: Mapping[str, Source], device: torch.device) -> None:
    """Replaces parameters and buffers on the meta device by stand-ins.

    Args:
        model: The model.
        sources: Name -> the values; of tied weights, the name of one suffices.
        device: The device for the stand-ins.

    Raises:
        QCompilerError: A tensor on the meta device has no source.
    """
    known = {id(each) for name, each in named_tensors(model).items() if name in sources}
    if lost := [name for name, each in named_tensors(model).items() if each.is_meta and id(each) not in known]:
        raise QCompilerError("a weight of the model has no values", got=lost[0], need="a tensor in the files")
    missing = [each for each in (*model.parameters(), *model.buffers()) if each.is_meta]
    largest = {dtype: max(each.numel() for each in missing if each.dtype is dtype) for dtype in _dtypes(missing)}
    shared = {dtype: _random(length + PERIOD, dtype, device) for dtype, length in largest.items()}
    made: dict[int, Tensor] = {}
    for number, tensor in enumerate(missing):
        start = number * STEP % PERIOD
        view = shared[tensor.dtype][start : start + tensor.numel()].view(tensor.shape)
        is_parameter = isinstance(tensor, nn.Parameter)
        made[id(tensor)] = nn.Parameter(view, requires_grad=False) if is_parameter else view
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            new = {name: made[id(each)] for name, each in own.items() if each is not None and id(each) in made}
            own.update(new)  # type: ignore[arg-type]  # parameters for parameters
    model.__dict__[_SOURCES] = dict(sources)


def sources_of(model: nn.Module) -> Mapping[str, Source]:
    """Name of each stand-in -> the values that it stands for; empty for a model that holds all of its weights."""
    found: Mapping[str, Source] = model.__dict__.get(_SOURCES, {})
    return found


def _dtypes(tensors: Iterable[Tensor]) -> set[torch.dtype]:
    return {each.dtype for each in tensors}


def _random(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as weights have them, and finite codes."""
    generator = torch.Generator().manual_seed(0)
    if not dtype.is_floating_point:
        some = torch.randint(-100, 100, (PERIOD,), generator=generator).to(dtype)
    elif dtype.itemsize == 1:
        some = (torch.randn(PERIOD, generator=generator) * 100).clamp(-400, 400).to(dtype)
    else:
        some = (torch.randn(PERIOD, generator=generator) / 50).to(dtype)
    count = -(-length // PERIOD)
    return some.to(device).view(torch.uint8).repeat(count).view(dtype)[:length]
