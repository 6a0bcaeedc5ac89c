"""Compile options of every kernel, at launch and ahead of time, unless the caller sets them."""

from typing import Any

from codegen.assembler import use_assembler

# Sums rely on fused multiply-adds. Without the option Triton reads TRITON_DEFAULT_FP_FUSION, and 3.10 turns it off.
_DEFAULTS = {"enable_fp_fusion": True}


def compile_options(options: dict[str, int]) -> dict[str, Any]:
    """Triton's compile options for a kernel with these `num_warps`, `num_stages` and others; chooses the assembler."""
    use_assembler()
    return {**_DEFAULTS, **options}
