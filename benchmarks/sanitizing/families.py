"""The families of kernels, by name; those that compile longest come first."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.sanitizing.caches import appends, attention, fused_appends, latents, quantized_attention, reads
from benchmarks.sanitizing.place import Place
from benchmarks.sanitizing.products import chosen_products, fused_products, grouped_products, products, row_products
from benchmarks.sanitizing.ranks import chosen_exchanges, exchanges, fused_sums, stored_matmuls
from benchmarks.sanitizing.rows import (
    fused_quantizations,
    gathered_codes,
    grouped_entries,
    known_scales,
    pointwise,
    quantizations,
    tokens,
)

E4M3 = torch.float8_e4m3fn

FAMILIES: dict[str, Callable[[Place], Iterator[str]]] = {
    "GEMM": partial(products, 128),
    "GEMM, scales of 64": partial(products, 64),
    "GEMM, scales of 32": partial(products, 32),
    "GEMM, scales of K": partial(products, -1),
    "attention to a latent": latents,
    "attention, f8": partial(attention, E4M3),
    "attention, int8": partial(attention, torch.int8),
    "attention, bf16": partial(attention, torch.bfloat16),
    "attention, quantized": quantized_attention,
    "GEMM, f8 rows": partial(row_products, "rows_f8"),
    "GEMM, int8 rows": partial(row_products, "rows_i8"),
    "GEMM, fused": fused_products,
    "GEMM, grouped": grouped_products,
    "GEMM, chosen": chosen_products,
    "quantize, f8": partial(quantizations, E4M3),
    "quantize, int8": partial(quantizations, torch.int8),
    "quantize, known scales": known_scales,
    "fused quantize": fused_quantizations,
    "append": appends,
    "fused append": fused_appends,
    "pointwise": pointwise,
    "read a cache": reads,
    "gather codes": gathered_codes,
    "group entries": grouped_entries,
    "next tokens": tokens,
    "exchanges of ranks": exchanges,
    "exchanges of chosen tokens": chosen_exchanges,
    "matmuls stored by other ranks": stored_matmuls,
    "fused sums over ranks": fused_sums,
}
