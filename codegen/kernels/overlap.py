"""Programmatic dependent launch: kernels start while the ones before them still run.

    first kernel     ─ let_next_start ─ inputs_ready ──────────────┐ end
    second kernel        └─ set up, load weights ─── inputs_ready ─┴───────────┐ end
    third kernel                └─ set up, load weights ────────── inputs_ready┴──────

`inputs_ready` returns when all earlier kernels have completed and their writes are visible. A kernel calls it before it
reads what other kernels write, and before it writes to global memory, which an earlier kernel may still read. What it
does before costs no time: its launch, its set-up, and loads of weights.

`let_next_start` allows the next kernel to start as soon as all blocks of threads of this one have started. Matmuls read
weights and their scales early, so a kernel that may write these does not call it; torch's kernels never do.

Both are instructions only in kernels compiled with the option `launch_pdl`, and do nothing elsewhere: on GPUs without
this feature, and in the interpreter. Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch".
"""

from typing import Any

from triton.language import core


def inputs_ready(_semantic: Any = None) -> None:
    """Waits until the kernels before this one have completed; `griddepcontrol.wait`."""
    _emit("griddepcontrol.wait;", _semantic)


def let_next_start(_semantic: Any = None) -> None:
    """Lets the next kernel start; `griddepcontrol.launch_dependents`."""
    _emit("griddepcontrol.launch_dependents;", _semantic)


for _function in (inputs_ready, let_next_start):
    # Not by Triton's decorator: its functions cannot be called without a compiler, as the interpreter does.
    setattr(_function, core.TRITON_BUILTIN, True)


def _emit(instruction: str, semantic: Any) -> None:
    if semantic is not None and getattr(semantic.builder.options, "launch_pdl", False):
        core.inline_asm_elementwise(
            f"{instruction} // $0 is not used", "=r", [], dtype=core.int32, is_pure=False, pack=1, _semantic=semantic
        )
