"""The kernels as torch operators, in `torch.ops.qcompiler`.

On a CPU they run `qcompiler.numerics`; on a GPU they launch the kernels of its target. Each module of
`codegen.operators` declares some of them, and this module registers all.

They are defined through `Library.define` and `Library.impl`, whose calls cost half as much as `custom_op`. Importing
this module needs no GPU.
"""

import torch

from codegen.operators.operator import OPERATORS
from qcompiler.entry_points import import_modules


def register() -> torch.library.Library:
    """Defines the declared operators that are not defined yet; deleting the library would unregister them."""
    import_modules("codegen.operators")
    # A fragment, because the namespace may hold more operators than these.
    library = torch.library.Library("qcompiler", "FRAGMENT")
    for name, operator in OPERATORS.items():
        if hasattr(torch.ops.qcompiler, name):  # by another copy of this module
            continue
        library.define(operator.schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, operator.on_cpu, "CPU")
        library.impl(name, operator.on_gpu, "CUDA")
        torch.library.register_fake(f"qcompiler::{name}", operator.fake, lib=library)
    return library


if "_LIBRARY" not in globals():  # a reload keeps the library
    _LIBRARY = register()
