"""Programmatic dependent launch: kernels start while the ones before them still run.

    first kernel     ─ let_next_start ─ inputs_ready ──────────────┐ end
    second kernel        └─ set up, load weights ─── inputs_ready ─┴───────────┐ end
    third kernel                └─ set up, load weights ────────── inputs_ready┴──────

`inputs_ready` returns when all earlier kernels have completed and their writes are visible. A kernel calls it before it
reads what other kernels write, and before it writes to global memory, which an earlier kernel may still read. What it
does before costs no time: its launch, its set-up, and loads of weights.

`let_next_start` allows the next kernel to start as soon as all blocks of threads of this one have started. Matmuls read
weights and their scales early, so a kernel that may write these does not call it; torch's kernels never do.

`prefetch` moves data to the L2 cache. It needs no wait: the cache is coherent, so data that an earlier kernel writes
later is simply written there. Its addresses may depend on numbers that are read early, and read again after the wait.

All three are instructions only in kernels compiled with the option `launch_pdl`, and do nothing elsewhere: on GPUs
without this feature, and in the interpreter. Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch".
"""

from typing import Any

from triton.language import core


def inputs_ready(_semantic: Any = None) -> None:
    """Waits until the kernels before this one have completed; `griddepcontrol.wait`."""
    _emit("griddepcontrol.wait;", _semantic)


def let_next_start(_semantic: Any = None) -> None:
    """Lets the next kernel start; `griddepcontrol.launch_dependents`."""
    _emit("griddepcontrol.launch_dependents;", _semantic)


def prefetch(addresses: Any, _semantic: Any = None) -> None:
    """Starts to move the lines of 128 bytes at these addresses to the L2 cache; `prefetch.global.L2`."""
    _emit("prefetch.global.L2 [$1];", _semantic, addresses)


for _function in (inputs_ready, let_next_start, prefetch):
    # Not by Triton's decorator: its functions cannot be called without a compiler, as the interpreter does.
    setattr(_function, core.TRITON_BUILTIN, True)


def _emit(instruction: str, semantic: Any, *arguments: Any) -> None:
    if semantic is not None and getattr(semantic.builder.options, "launch_pdl", False):
        text, registers = f"{instruction} // $0 is not used", ",".join(["=r", *["l" for _ in arguments]])
        core.inline_asm_elementwise(
            text, registers, list(arguments), dtype=core.int32, is_pure=False, pack=1, _semantic=semantic
        )
