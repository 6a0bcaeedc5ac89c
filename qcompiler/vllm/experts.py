"""The experts of a mixture in vLLM over qcompiler's kernels: codes and scales of each expert, then two grouped GEMMs.

w13_weight        [E, 2 P, H]   codes: gate, then up, each with rows of zeros up to a multiple of the block
w13_weight_scale  FP32          their scales
w2_weight         [E, H, I]     codes: down
w2_weight_scale   FP32          their scales

    quantize · gather by expert · grouped_linear · activation · quantize · grouped_linear · weighted sum for each token

I is the inner width on this GPU, and P is I with padding. Without a gate, w13 has P rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.platforms import current_platform

from codegen.operators.grouped_linear import E4M3, X_BLOCK
from codegen.support import WEIGHT_BLOCK
from qcompiler import numerics
from qcompiler.checkpoints.layer_schemes import LayerSchemes
from qcompiler.errors import QCompilerError
from qcompiler.ir import ALL
from qcompiler.numerics import torch_dtype
from qcompiler.schemes.pipelines import QuantizationSpec
from qcompiler.vllm.shards import Share, blocks_in, check_loaded, cut_error, share_of

ACTIVATIONS: dict[Any, Callable[[Tensor], Tensor]] = {
    MoEActivation.SILU: functional.silu,
    MoEActivation.GELU: functional.gelu,
    MoEActivation.SILU_NO_MUL: functional.silu,
    MoEActivation.GELU_NO_MUL: functional.gelu,
}
"""Those that run; the first two multiply the result by the second half of the columns."""


class QCompilerMoEMethod(FusedMoEMethodBase):
    """Runs the experts of one layer in one quantization spec.

    Args:
        spec: How the experts are quantized.
        layer: vLLM's layer.
        name: The full name of the layer.

    Raises:
        QCompilerError: The layer has a part that the plug-in does not support, or the device cannot run the spec.
    """

    def __init__(self, spec: QuantizationSpec, layer: Any, name: str) -> None:
        super().__init__(layer.moe_config)
        self.spec, self.name = spec, name
        self.element, self.profile = torch_dtype(spec.w.element), spec.x.profile
        self.x_block, self.w_block = [*spec.x.block], [*spec.w.block]
        self.layout = "row_major" if spec.x.block[1] == ALL else "col_major"
        if (why := self._why_not(layer)) is not None:
            raise QCompilerError(
                f"the plug-in does not run the quantized experts '{name}': {why}",
                fix=f'Leave them in float: overrides={{"*{name.rpartition(".")[2]}*": None}}.',
            )

    def _why_not(self, layer: Any) -> str | None:
        """Why the layer cannot run; None if it can."""
        moe, spec = self.moe, self.spec
        if moe.moe_parallel_config.use_ep:
            return "vLLM would spread whole experts over GPUs; split each expert instead, without expert parallelism"
        if moe.has_bias or layer.apply_router_weight_on_input:
            return "they have a bias" if moe.has_bias else "the router's weights multiply their input"
        if layer.activation not in ACTIVATIONS:
            return f"their activation is '{layer.activation.value}', not one of silu and gelu"
        if layer.swiglu_limit is not None:
            return "their activation has a limit"
        if spec.static or spec.x.block[0] != 1 or spec.w.block[0] == ALL:
            return "their scheme has a scale for a whole tensor"
        on_kernel = (spec.x.block, spec.w.block, self.element) == (X_BLOCK, WEIGHT_BLOCK, E4M3)
        if current_platform.is_cuda() and not on_kernel:
            return "no GPU kernel runs experts in their scheme, only in 'fp8_tile'"
        return None

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Registers the parameters; raises QCompilerError if a share begins inside a block."""
        width, shares = intermediate_size_per_partition, self.moe.tp_size
        names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        sources = [f"{self.name}.{name}" for name in names if name is not None]
        for axis, block in zip(("output", "input"), self.w_block, strict=True):
            share = Share(self.name, axis, width, width * shares, block)
            if share.is_cut:
                raise cut_error(share, sources)
        self.width, self.padded = width, blocks_in(width, self.w_block[0]) * self.w_block[0]
        rows = self.padded * (2 if self.moe.is_act_and_mul else 1)
        for stem, shape in {"w13": (num_experts, rows, hidden_size), "w2": (num_experts, hidden_size, width)}.items():
            # The padding stays zero.
            codes = torch.zeros(shape, dtype=torch.uint8).view(self.element)
            scale = torch.full(numerics.scale_shape(shape, self.w_block), torch.nan, dtype=torch.float32)
            for name, data, down in (("weight", codes, rows), ("weight_scale", scale, scale.shape[1])):
                parameter = nn.Parameter(data, requires_grad=False)
                parameter.weight_loader = self._loader(layer, down)  # type: ignore[attr-defined]
                layer.register_parameter(f"{stem}_{name}", parameter)

    def _loader(self, layer: Any, rows: int) -> Any:
        """The loader of a parameter, which vLLM calls for each tensor of each expert in the files.

        Args:
            layer: vLLM's layer.
            rows: Rows of `w13`, of codes or of scales.
        """

        def load(
            param: nn.Parameter,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            local, rank = layer._map_global_expert_id_to_local_expert_id(expert_id), self.moe.tp_rank
            into, is_scale = param.data[local], weight_name.endswith("_scale")
            if shard_id != "w2":
                half = rows // (2 if self.moe.is_act_and_mul else 1)
                start, own = half * (shard_id == "w3"), half if is_scale else self.width
                into = into[start : start + own]
            into.copy_(share_of(loaded_weight, into.shape[0], rank, into.shape[1], rank))
            return True if return_success else None

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises QCompilerError if the files lack a scale."""
        for name in ("w13_weight_scale", "w2_weight_scale"):
            check_loaded(f"{self.name}.{name}", getattr(layer, name).data)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: vLLM's own kernels for experts do not run."""

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """The weighted sum of the chosen experts, `[T, H]` in the dtype of `x`; on several GPUs, this GPU's part.

        Args:
            layer: vLLM's layer.
            x: `[T, H]`.
            topk_weights: Weights of the chosen experts, `[T, k]`.
            topk_ids: Their numbers, integers `[T, k]`.
            shared_experts: Unused; vLLM adds their result.
            shared_experts_input: Unused.
        """
        ops, (count, chosen) = torch.ops.qcompiler, topk_ids.shape
        keys = topk_ids.reshape(-1).to(torch.int64)
        _, order, owner, place, ends = ops.group_entries(keys, layer.w13_weight.shape[0], chosen)
        codes, scale = ops.gather_codes(*self._quantized(x), owner, self.x_block, self.layout)
        inner = self._multiply(codes, scale, layer.w13_weight, layer.w13_weight_scale, ends, x.dtype)
        outer = self._multiply(
            *self._quantized(self._activated(layer, inner)), layer.w2_weight, layer.w2_weight_scale, ends, x.dtype
        )
        weighted = outer * topk_weights.reshape(-1)[order].unsqueeze(-1)
        return weighted[place].view(count, chosen, -1).sum(dim=1).to(x.dtype)

    def _activated(self, layer: Any, inner: Tensor) -> Tensor:
        """The activation of the first matmul, `[T k, I]`, times the other half of the columns if there is a gate."""
        found = ACTIVATIONS[layer.activation](inner[:, : self.width])
        if not self.moe.is_act_and_mul:
            return found
        return found * inner[:, self.padded : self.padded + self.width]

    def _quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of an activation."""
        codes, scale = torch.ops.qcompiler.quantize(x, self.x_block, self.element, self.profile, self.layout, None)
        return codes, scale

    def _multiply(self, x_q: Tensor, x_s: Tensor, w_q: Tensor, w_s: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
        """The grouped matmul."""
        found: Tensor = torch.ops.qcompiler.grouped_linear(x_q, x_s, w_q, w_s, ends, self.x_block, self.w_block, dtype)
        return found


def scheme_of_experts(schemes: LayerSchemes, layer: Any, name: str) -> str | None:
    """The scheme of all experts of a layer, as text; None for experts in float.

    Args:
        schemes: The schemes of the folder.
        layer: vLLM's layer.
        name: Its full name.

    Raises:
        QCompilerError: The experts have different schemes.
    """
    parts = _parts(layer, name)
    inner = {part: scheme for part, scheme in schemes.overrides.items() if part.startswith(f"{name}.")}
    # A model of vLLM may rename the parts in the files, but not their number.
    known = {part: schemes.of(part) for part in parts} if {*inner} <= {*parts} else inner
    found = {scheme: part for part, scheme in known.items()}
    if known is inner and len(inner) < len(parts):
        found.setdefault(schemes.scheme, "the others")
    if len(found) > 1:
        got = ", ".join(f"{scheme or 'float'} in '{part}'" for scheme, part in found.items())
        raise QCompilerError(
            "vLLM computes the experts of a layer together, and they have different schemes",
            got=got,
            need="one scheme",
            fix='Compile with one override for them: {"*.experts.*": SCHEME}.',
        )
    if wrong := [part for part in schemes.prescaled if part.startswith(f"{name}.")]:
        need = "experts that read their input as it is"
        raise QCompilerError("smoothing left factors of the input channels of an expert", got=repr(wrong[0]), need=need)
    return next(iter(found))


def _parts(layer: Any, name: str) -> Sequence[str]:
    """The names in the files of the matrices of all experts."""
    names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
    return [
        f"{name}.{expert}.{part}"
        for expert in range(layer.moe_config.num_logical_experts)
        for part in names
        if part is not None
    ]
