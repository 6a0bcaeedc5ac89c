"""What is going on, on standard error if it is a terminal: one line that changes, then one line of times."""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.status import Status

from passes.quantizing.calibrate import Calibrate
from qcompiler.ir import Graph
from qcompiler.pass_manager.instruments import Instrument, Outcome
from qcompiler.pass_manager.pipeline import Pass


class Progress(Instrument):
    """Shows the stages of a command, and pass by pass where it is among the instruments of `compile`.

    Args:
        shown: Whether to show anything; if standard error is not a terminal, nothing is shown.
        passes: How many passes there will be.
        summary: Whether to print what each stage took at the end.

    Attributes:
        seconds: What each stage took, by its name, in order.
    """

    def __init__(self, shown: bool, passes: int = 0, summary: bool = True) -> None:
        self.seconds: dict[str, float] = {}
        self._console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        self._status: Status | None = None
        self._shown, self._summary = shown and sys.stderr.isatty(), summary
        self._passes, self._done = passes, 0
        self._name, self._since = "", 0.0

    @contextmanager
    def showing(self) -> Iterator["Progress"]:
        """Shows progress until the block ends; then the times, if it ended well."""
        try:
            with self._console.status("") if self._shown else nullcontext() as self._status:
                yield self
        finally:
            self._status = None
            self._over()
        if self._shown and self._summary:
            self._console.print("; ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items()))

    def stage(self, name: str) -> None:
        """A new stage begins, and the one before it is over."""
        self._over()
        self._name, self._since = name, time.perf_counter()
        self.tell(name)

    def tell(self, text: str) -> None:
        """Changes the line that is shown."""
        if self._status is not None:
            self._status.update(text)

    @contextmanager
    def telling(self, logger: str) -> Iterator[None]:
        """Shows what a logger says at level INFO, such as which sizes capture tries, until the block ends."""
        if self._status is None:
            yield
            return
        source, handler = logging.getLogger(logger), _Teller(self)
        before = source.level
        source.addHandler(handler)
        source.setLevel(logging.INFO)
        try:
            yield
        finally:
            source.removeHandler(handler)
            source.setLevel(before)

    def _over(self) -> None:
        if self._name:
            taken = time.perf_counter() - self._since
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + taken
        self._name = ""

    # Around passes

    def begin(self, graph: Graph, inputs: Sequence[Any] | None) -> None:
        """The model is captured, and the passes begin."""
        self._done = 0
        self.stage("passes")

    def before(self, step: Pass, graph: Graph) -> None:
        """Names the pass; one that calibrates shows a bar of its own."""
        self._done += 1
        self.tell(f"pass {self._done} of {self._passes}: {step.name}")
        if self._status is not None and isinstance(step, Calibrate):
            self._status.stop()

    def after(self, step: Pass, graph: Graph, outcome: Outcome) -> None:
        """Goes on."""
        if self._status is not None and isinstance(step, Calibrate):
            self._status.start()

    def end(self, graph: Graph) -> None:
        """The passes are done."""
        self.stage("code generation")


class _Teller(logging.Handler):
    """Shows log records as the current line."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.INFO)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.tell(f"capture: {record.getMessage()}")
