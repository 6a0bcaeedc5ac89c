"""A linear layer of vLLM over qcompiler's kernels: loads codes and scales, then quantize · scaled_linear.

weight          codes, cut by vLLM's own loaders
weight_scale    FP32, the scales of all parts, cut along blocks by `_scale_loader`
input_scale     FP32, one for each part, if the scheme is static
input_prescale  FP32, the factors of the input channels for each part, cut as the input is, if smoothing left any
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import ModelWeightParameter

from qcompiler.checkpoints.layer_schemes import PRESCALE, SCALE, X_SCALE
from qcompiler.ir import ALL
from qcompiler.ir.formats import Block
from qcompiler.numerics import torch_dtype
from qcompiler.schemes.pipelines import QuantizationSpec
from qcompiler.vllm.shards import (
    Joined,
    Share,
    Spans,
    blocks_in,
    check_loaded,
    cut_error,
    join,
    share_of,
    split,
    spread,
)

QKV = {"q": 0, "k": 1, "v": 2}
"""vLLM's names of the parts of an attention projection."""


@register_weight_loader_v2_supported_method
class QCompilerLinearMethod(LinearMethodBase):
    """Runs one quantization spec.

    Args:
        spec: How the layer is quantized.
        name: The full name of the layer.
        sources: The names in the files of the layers that it merges.
        prescaled: Whether the input is multiplied by a factor per channel before it is quantized.
        scale: The name of the weight's scales in the files.
    """

    def __init__(
        self, spec: QuantizationSpec, name: str, sources: Sequence[str], *, prescaled: bool = False, scale: str = SCALE
    ) -> None:
        self.spec, self.name, self.sources, self.scale = spec, name, sources, scale
        self.x_tensors = [X_SCALE] * spec.static + [PRESCALE] * prescaled
        self.element, self.profile = torch_dtype(spec.w.element), spec.x.profile
        self.x_block, self.w_block = list(spec.x.block), spec.w.block
        tiled = self.x_block[0] == 1 and self.x_block[1] != ALL
        self.layout = "col_major" if tiled else "row_major"

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Registers the parameters; raises QCompilerError if a share begins inside a block."""
        depth, widths = input_size_per_partition, output_partition_sizes
        layer.quantized_parts = parts = _parts(layer, self.name, self.w_block, widths, output_size // sum(widths))
        shares = [Share(self.name, "output", part.width, part.whole, self.w_block[0]) for part in parts]
        for share in (*shares, Share(self.name, "input", depth, input_size, self.w_block[1])):
            if share.is_cut:
                raise cut_error(share, self.sources)
        codes = torch.empty(sum(widths), depth, dtype=self.element)
        loader = extra["weight_loader"]
        weight = ModelWeightParameter(data=codes, input_dim=1, output_dim=0, weight_loader=loader)
        layer.register_parameter("weight", weight)
        # While vLLM builds a model, the default dtype is the model's.
        rows, columns = sum(part.scales for part in parts), blocks_in(depth, self.w_block[1])
        scale = torch.full((rows, columns), torch.nan, dtype=torch.float32)
        layer.register_parameter(self.scale, _parameter(scale, _scale_loader(layer, self.name, self.w_block[0])))
        for name in self.x_tensors:
            each = torch.full((len(parts), depth if name == PRESCALE else 1), torch.nan, dtype=torch.float32)
            layer.register_parameter(name, _parameter(each, _x_loader(layer)))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Joins consecutive parts whose activation is scaled and quantized alike: each group is one GEMM.

        Raises:
            QCompilerError: The files lack a scale.
        """
        for name in (self.scale, *self.x_tensors):
            check_loaded(f"{self.name}.{name}", getattr(layer, name).data)
        of_parts = {name: getattr(layer, name).data for name in self.x_tensors}
        codes, scales = layer.weight.data, getattr(layer, self.scale).data
        delattr(layer, self.scale)
        layer.quantized_groups = []
        row = scale_row = 0
        for first, parts in _groups(layer.quantized_parts, of_parts.values()):
            widths, count = [part.width for part in parts], sum(part.scales for part in parts)
            rows = slice(row, row + sum(widths))
            joined = join(codes[rows], scales[scale_row : scale_row + count], widths, self.w_block)
            own = {name: each[first : first + 1] for name, each in of_parts.items()}
            layer.quantized_groups.append(_registered(layer, joined, own, rows))
            row, scale_row = rows.stop, scale_row + count

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., K] -> [..., N]` in the dtype of `x`."""
        results: list[Tensor] = []
        for suffix, w_block, kept in layer.quantized_groups:
            codes, scale = getattr(layer, "weight" + suffix), getattr(layer, "weight_scale" + suffix)
            of_x = (getattr(layer, name + suffix, None) for name in (X_SCALE, PRESCALE))
            x_q, x_s = self._quantized(x, *of_x)
            own = None if bias is None else getattr(layer, "joined_bias" + suffix, bias)
            y = torch.ops.qcompiler.scaled_linear(x_q, x_s, codes, scale, own, self.x_block, w_block, x.dtype)
            results += [y] if kept is None else [y[..., start:end] for start, end in kept]
        return results[0] if len(results) == 1 else torch.cat(results, -1)

    def _quantized(self, x: Tensor, x_scale: Tensor | None, prescale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes and scales of an activation."""
        ops, factors = torch.ops.qcompiler, None if prescale is None else prescale[0]
        if x_scale is not None:
            return ops.quantize_static(x, x_scale, self.x_block, self.element, self.profile, factors), x_scale
        codes, scale = ops.quantize(x, self.x_block, self.element, self.profile, self.layout, factors)
        return codes, scale


@dataclass(frozen=True)
class Part:
    """One of the matrices that a layer merges.

    Attributes:
        width: Rows on this GPU.
        whole: Rows in the files.
        scales: Scales along the rows on this GPU.
        replicas: GPUs that hold the same rows: more than one for keys and values of few heads.
    """

    width: int
    whole: int
    scales: int
    replicas: int


def _parts(layer: Any, name: str, block: Block, widths: Sequence[int], shares: int) -> list[Part]:
    """The parts of a layer that is cut into `shares` along its rows."""
    replicas = [1] + [getattr(layer, "num_kv_head_replicas", 1)] * (len(widths) - 1)
    return [
        Part(width, width * shares // same, blocks_in(width, block[0]), same)
        for width, same in zip(widths, replicas, strict=True)
    ]


def _parameter(data: Tensor, loader: Any = None) -> nn.Parameter:
    parameter = nn.Parameter(data, requires_grad=False)
    if loader is not None:
        parameter.weight_loader = loader  # type: ignore[attr-defined]
    return parameter


def _scale_loader(layer: Any, name: str, block: int) -> Any:
    """The loader of a layer's weight scales, which vLLM calls for each tensor in the files.

    Args:
        layer: The layer.
        name: The full name of the layer.
        block: Rows that share a scale.
    """

    def load(param: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
        parts, rank = layer.quantized_parts, getattr(layer, "tp_rank", 0)
        chosen = _chosen(shard, len(parts))
        loaded = loaded if loaded.dim() == 2 else loaded.reshape(-1, 1)
        scales = split(name, loaded, [parts[at].whole for at in chosen], block)
        for at, scale in zip(chosen, scales, strict=True):
            start = sum(part.scales for part in parts[:at])
            into = param.data[start : start + parts[at].scales]
            into.copy_(share_of(scale, into.shape[0], rank // parts[at].replicas, into.shape[1], rank))

    return load


def _x_loader(layer: Any) -> Any:
    """The loader of what belongs to an activation, which all parts in one tensor of the files share.

    A layer whose input is split takes the factors of its own channels.
    """

    def load(param: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
        own = param.shape[1]
        start = own * getattr(layer, "tp_rank", 0) if loaded.numel() > own else 0
        for part in _chosen(shard, len(param)):
            param.data[part] = loaded.reshape(-1)[start : start + own]

    return load


def _chosen(shard: Any, count: int) -> Sequence[int]:
    """The parts in one tensor of the files: vLLM names one, several, or, if the files have a merged layer, none."""
    if shard is None:
        return range(count)
    return shard if isinstance(shard, tuple) else (QKV.get(shard, shard),)


def _groups(parts: Sequence[Part], of_parts: Collection[Tensor]) -> list[tuple[int, list[Part]]]:
    """Consecutive parts with equal tensors of the activation, each group with the number of its first part."""
    groups: list[tuple[int, list[Part]]] = []
    for at, part in enumerate(parts):
        if groups and all(torch.equal(each[at], each[at - 1]) for each in of_parts):
            groups[-1][1].append(part)
        else:
            groups.append((at, [part]))
    return groups


def _registered(
    layer: Any, joined: Joined, of_x: Mapping[str, Tensor], rows: slice
) -> tuple[str, list[int], Spans | None]:
    """Registers the tensors of a group; returns the suffix of their names, the block, and the columns to keep."""
    suffix = f"_{len(layer.quantized_groups)}" if layer.quantized_groups else ""
    bias = getattr(layer, "bias", None)
    if bias is not None and (joined.kept is not None or len(layer.quantized_parts) > 1):
        bias = spread(bias.data[rows], joined)
        setattr(layer, "joined_bias" + suffix, _parameter(bias))
    for name, tensor in {"weight": joined.codes, "weight_scale": joined.scale, **of_x}.items():
        setattr(layer, name + suffix, _parameter(tensor))
    return suffix, list(joined.block), joined.kept
