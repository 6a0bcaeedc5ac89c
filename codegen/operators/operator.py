"""The declaration of a torch operator: its schema, its meaning, and its launch on a GPU.

Each module of `codegen.operators` declares its operators; `codegen.torch_ops` finds and registers them. A fake
implementation lets `torch.compile`, `torch.export` and CUDA graphs treat an operator as an opaque node. Everything that
depends on the number of rows happens inside, at run time, so no graph is specialized on it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class Operator(NamedTuple):
    """A functional torch operator.

    Attributes:
        schema: In torch's syntax, without a namespace.
        on_cpu: Runs on CPU tensors, by `qcompiler.numerics`; gets the arguments in schema order.
        on_gpu: Launches the kernels of the target of a CUDA device.
        fake: The results without data, and the errors that depend only on shapes and dtypes.
    """

    schema: str
    on_cpu: Callable[..., Any]
    on_gpu: Callable[..., Any]
    fake: Callable[..., Any]


OPERATORS: dict[str, Operator] = {}
"""The declared operators, by name."""


def declare(operator: Operator) -> None:
    """Declares an operator."""
    OPERATORS[operator.schema.partition("(")[0]] = operator
