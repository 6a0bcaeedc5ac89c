"""A time limit for torch.export with dynamic sizes.

Each dynamic size is a symbol, and torch proves facts about symbolic expressions with sympy; for heights and widths of
an image model with windows this takes minutes. torch.export has no way to stop it. But every proof goes through a few
methods of its `ShapeEnv`; while the limit is active, they check the clock first. The clock is the CPU time of the
thread, so load on the machine does not change what is captured.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch.fx.experimental.symbolic_shapes import ShapeEnv

ENTRANCES = ("_maybe_evaluate_static", "simplify", "bound_sympy")
"""Methods of ShapeEnv that proofs go through; methods missing in a torch version are skipped.

None of them is on the stack when torch creates a guard: torch would attribute the guard to this file.
"""


class OutOfTime(BaseException):
    """The time limit was exceeded. Not an Exception, because torch and models catch those."""


_running = threading.local()
_lock = threading.Lock()
_originals: dict[str, Callable[..., Any]] = {}
_users = 0


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises OutOfTime in this thread if a trace takes more CPU time than `seconds`; None means no limit."""
    if seconds is None:
        yield
        return
    before = getattr(_running, "until", None)
    _running.until = time.thread_time() + seconds
    _watch()
    try:
        yield
    finally:
        _unwatch()
        _running.until = before


def _watch() -> None:
    """Wraps the methods, if no other thread has done so."""
    global _users
    with _lock:
        _users += 1
        if _users > 1:
            return
        for name in ENTRANCES:
            if name in vars(ShapeEnv):
                _originals[name] = vars(ShapeEnv)[name]
                setattr(ShapeEnv, name, _watched(_originals[name]))


def _unwatch() -> None:
    """Restores the methods after the last thread."""
    global _users
    with _lock:
        _users -= 1
        if _users:
            return
        for name, method in _originals.items():
            setattr(ShapeEnv, name, method)
        _originals.clear()


def _watched(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def watched(*args: Any, **kwargs: Any) -> Any:
        until = getattr(_running, "until", None)
        if until is not None and time.thread_time() > until:
            raise OutOfTime
        return method(*args, **kwargs)

    return watched
