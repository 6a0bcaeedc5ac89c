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
        runs: The operation that host modules run through the operator, `kernel.<name>` by default. The schema has
            its operands in order, then its attributes by name; a format's are `block`, `dtype`, `profile` and
            `scale_layout`, with the prefix of the format.
    """

    schema: str
    on_cpu: Callable[..., Any]
    on_gpu: Callable[..., Any]
    fake: Callable[..., Any]
    runs: str | None = None

    @property
    def name(self) -> str:
        """Its name in `torch.ops.qcompiler`."""
        return self.schema.partition("(")[0]


OPERATORS: dict[str, Operator] = {}
"""The declared operators, by name."""

OPERATOR_NAMES: dict[str, str] = {}
"""Operation -> the name of the operator that runs it."""


def declare(operator: Operator) -> None:
    """Declares an operator."""
    OPERATORS[operator.name] = operator
    OPERATOR_NAMES[operator.runs or f"kernel.{operator.name}"] = operator.name
