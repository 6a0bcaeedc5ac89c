"""Runs a model, or its graph, in FP64 while every tensor still reports its original dtype.

A wrong scale or epsilon hides in the rounding noise of a deep bf16 model. In FP64 the noise is 1e-15, so any wrong
graph shows. The model's code must not notice: decisions that it bases on a dtype (`torch.finfo(x.dtype)`, a kernel
choice) are part of the graph. So a tensor keeps its dtype and carries an FP64 value. Weights are widened one at a time,
when an operator reads them.
"""

import math
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

WIDER: Mapping[torch.dtype, torch.dtype] = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}

CHUNK = 1 << 26
"""Weights with more elements than this (a vocabulary) are widened in parts."""

GATHERS = ("embedding", "index", "index_select", "gather")
"""Operators that read part of a weight: only the result is widened."""


class NotWidenable(Exception):
    """An operator cannot run in FP64."""


class WideTensor(torch.Tensor):
    """A tensor that reports one dtype and stores its entries in a wider one.

    Attributes:
        value: The wide entries.
    """

    value: torch.Tensor

    @staticmethod
    def __new__(cls, value: torch.Tensor, dtype: torch.dtype) -> "WideTensor":  # noqa: D102
        made: WideTensor = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), storage_offset=value.storage_offset(), dtype=dtype,
            device=value.device,
        )  # fmt: skip
        torch._C._set_throw_on_mutable_data_ptr(made)  # kernels outside torch must not read through a null pointer
        made.value = value
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares a function, and documents a class method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuses to run outside the mode, because the wide entries would be lost."""
        raise NotWidenable(f"{func} outside the mode")

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own idiom


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy that carries FP64; a plain copy if the tensor is not floating-point."""
    wider = WIDER.get(tensor.dtype)
    return tensor.clone() if wider is None else WideTensor(tensor.detach().to(wider), tensor.dtype)


def value_of(result: Any) -> Any:
    """Returns the FP64 entries of a tensor; anything else unchanged."""
    if isinstance(result, WideTensor):
        return result.value
    if isinstance(result, torch.Tensor) and result.dtype in WIDER:
        return result.to(WIDER[result.dtype])
    return result


class DoublePrecision(TorchDispatchMode):
    """While active, operators compute in FP64; results report the dtype that they would have had."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's constructor is untyped

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs one operator on wide entries."""
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        if func._schema.is_mutable:
            return _in_place(func, args, kwargs)
        if func is torch.ops.aten.view.dtype:
            raise NotWidenable("a tensor is reinterpreted as another dtype")
        views = any(returned.alias_info is not None for returned in func._schema.returns)
        if (views or name in GATHERS) and not _any_wide(args):
            found = func(*args, **kwargs)
            return found if views else pytree.tree_map_only(torch.Tensor, widened, found)
        found = SUBSTITUTES.get(name, _run)(func, args, kwargs)
        return _labeled(found, func, args, kwargs)


def _any_wide(tree: Any) -> bool:
    return any(isinstance(leaf, WideTensor) for leaf in pytree.tree_leaves(tree))


def _wide_argument(leaf: Any) -> Any:
    return WIDER.get(leaf, leaf) if isinstance(leaf, torch.dtype) else value_of(leaf)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs the operator itself on wide arguments; new floating-point results, as of integer division, are FP64 too."""
    args, kwargs = pytree.tree_map(_wide_argument, (args, kwargs))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return func(*args, **kwargs)
    finally:
        torch.set_default_dtype(default)


def _in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operator that writes into its first argument."""
    written = [index for index, arg in enumerate(func._schema.arguments) if arg.alias_info and arg.alias_info.is_write]
    target = args[0]
    if (
        written != [0]
        or not isinstance(target, torch.Tensor)
        or (type(target) is not WideTensor and target.dtype in WIDER)
    ):
        raise NotWidenable(f"{func} writes into a tensor that is not wide")
    shape = target.shape
    _run(func, args, kwargs)
    if value_of(target).shape != shape:
        raise NotWidenable(f"{func} changes a shape in place")
    return target


def _labeled(found: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """Labels wide results with the dtypes that the operator would have returned."""
    leaves, spec = pytree.tree_flatten(found)
    if not any(isinstance(leaf, torch.Tensor) and leaf.dtype in WIDER.values() for leaf in leaves):
        return found
    dtypes = _dtypes(func, args, kwargs, len(leaves))
    return pytree.tree_unflatten(
        [
            WideTensor(leaf, dtype) if isinstance(leaf, torch.Tensor) and dtype is not None and dtype in WIDER else leaf
            for leaf, dtype in zip(leaves, dtypes, strict=True)
        ],
        spec,
    )


def _dtypes(func: Any, args: Any, kwargs: Any, count: int) -> list[torch.dtype | None]:
    """Returns the result dtypes of an operator from a run without data; by type promotion if that fails."""
    try:
        leaves = pytree.tree_leaves(_without_data(func, args, kwargs))
        return [leaf.dtype if isinstance(leaf, torch.Tensor) else None for leaf in leaves]
    except Exception:  # result sizes depend on data, or the operator has no meta implementation
        given = kwargs.get("dtype")
        floats = [
            x.dtype for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dtype in WIDER
        ]
        promoted = given or reduce(torch.promote_types, floats, floats[0] if floats else torch.get_default_dtype())
        return [promoted] * count


def _without_data(func: Any, args: Any, kwargs: Any) -> Any:
    """Returns the results of an operator on the meta device."""

    def empty(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
        return torch.device("meta") if isinstance(leaf, torch.device) else leaf

    args, kwargs = pytree.tree_map(empty, (args, kwargs))
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs["device"] = torch.device("meta")
    return func(*args, **kwargs)


# Operators with a different implementation in FP64


def _attention(func: Any, args: Any, kwargs: Any) -> Any:
    """Attention by its definition: fused kernels do not support FP64. Their extra results are only for gradients."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    query, key, value = (value_of(given[name]) for name in ("query", "key", "value"))
    mask = value_of(given.get("attn_mask", given.get("attn_bias")))
    if given.get("dropout_p"):
        raise NotWidenable("attention with dropout")
    with sdpa_kernel(SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, mask, is_causal=bool(given.get("is_causal")), scale=given.get("scale"),
            enable_gqa=query.shape[-3] != key.shape[-3],
        )  # fmt: skip
    like, *rest = _without_data(func, args, kwargs)
    strided = torch.empty_strided(out.shape, like.stride(), dtype=out.dtype, device=out.device).copy_(out)
    return (strided, *(torch.empty_like(x, device=out.device) if isinstance(x, torch.Tensor) else x for x in rest))


def _matmul(func: Any, args: Any, kwargs: Any) -> Any:
    """`mm` and `bmm`; a large second operand is widened in parts."""
    left, right = value_of(args[0]), args[1]
    if isinstance(right, WideTensor) or right.numel() <= CHUNK:
        return _run(func, args, kwargs)
    axis = 1 if right.ndim == 2 else 0  # the columns of a matrix, or the matrices of a batch
    parts = math.ceil(right.numel() / CHUNK)
    lefts = left.chunk(parts, 0) if axis == 0 else None
    rights = right.chunk(parts, axis)
    found = [_run(func, (left if lefts is None else lefts[i], part), kwargs) for i, part in enumerate(rights)]
    return torch.cat(found, axis)


def _addmm(func: Any, args: Any, kwargs: Any) -> Any:
    """`addmm`, like `_matmul` with a bias."""
    if kwargs or isinstance(args[2], WideTensor) or args[2].numel() <= CHUNK:
        return _run(func, args, kwargs)
    return value_of(args[0]) + _matmul(torch.ops.aten.mm.default, args[1:], {})


def _grouped(func: Any, args: Any, kwargs: Any) -> Any:
    """Grouped GEMM: the kernel supports bf16 only."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    rows, matrices, ends = value_of(given["self"]), given["mat2"], given.get("offs")
    if rows.ndim != 2 or matrices.ndim != 3 or ends is None or given.get("bias") is not None:
        raise NotWidenable(f"{func} with these arguments")
    out = rows.new_zeros(rows.shape[0], matrices.shape[2])
    start = 0
    for end, matrix in zip(ends.tolist(), matrices, strict=True):
        out[start:end] = rows[start:end] @ value_of(matrix)
        start = end
    return out


SUBSTITUTES: Mapping[str, Callable[[Any, Any, Any], Any]] = {
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        _attention,
    ),
    "mm": _matmul, "bmm": _matmul, "addmm": _addmm, "_grouped_mm": _grouped,
}  # fmt: skip
"""Operator -> its replacement."""
