"""A limit to the time that torch.export may take with open sizes.

Each open size is a symbol, and torch proves facts about expressions of symbols with sympy: for heights and widths of an
image model with windows, for minutes. There is no way to ask torch.export to stop. Every proof goes through a few
methods of its `ShapeEnv`, though; within the limit they are replaced by ones that look at the clock first. The clock is
the CPU time of the thread, so that a busy machine does not change what is captured.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch.fx.experimental.symbolic_shapes import ShapeEnv

ENTRANCES = ("_maybe_evaluate_static", "simplify", "bound_sympy")
"""Methods of ShapeEnv through which proofs go; those that a version of torch does not have are left out.

None of them is on the stack when a guard is made: torch would take this file for the place that asked.
"""


class OutOfTime(BaseException):
    """The time is over. Not an Exception: torch and models catch those on their way."""


_running = threading.local()
_lock = threading.Lock()
_originals: dict[str, Callable[..., Any]] = {}
_users = 0


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises OutOfTime out of a trace in this thread when it takes more CPU time than `seconds`; None is no limit."""
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
    """Replaces the entrances, if no other thread has done so."""
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
    """Puts the entrances back after the last thread."""
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
