"""qcompiler: a quantization compiler for PyTorch models.

    fast = qcompiler.compile(model, scheme="fp8_tile")
    print(fast.stages["fp8-tile"], fast.report, fast.source)

Importing this package loads neither torch nor triton: each public name is loaded on first use.
"""

from typing import Any

from qcompiler import front_door

__all__ = [*front_door.public_names()]


def __getattr__(name: str) -> Any:
    value = globals()[name] = front_door.load(name)
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
