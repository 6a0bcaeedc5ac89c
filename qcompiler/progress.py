"""Progress on standard error if it is a terminal: a status line, then a line of stage times."""

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
    """Shows the stages of a command, and each pass if used as an instrument of `compile`.

    Args:
        shown: Whether to show progress; nothing is shown if standard error is not a terminal.
        passes: Total number of passes.
        summary: Whether to print the stage times at the end.

    Attributes:
        seconds: Stage name -> seconds, in order.
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
        """Shows progress until the block ends, then the stage times if it did not raise."""
        try:
            with self._console.status("") if self._shown else nullcontext() as self._status:
                yield self
        finally:
            self._status = None
            self._over()
        if self._shown and self._summary:
            self._console.print("; ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items()))

    def stage(self, name: str) -> None:
        """Ends the current stage and begins the next one."""
        self._over()
        self._name, self._since = name, time.perf_counter()
        self.tell(name)

    def tell(self, text: str) -> None:
        """Updates the status line."""
        if self._status is not None:
            self._status.update(text)

    @contextmanager
    def telling(self, logger: str) -> Iterator[None]:
        """Shows the INFO messages of a logger, such as the sizes that capture tries, until the block ends."""
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
        """Begins the passes stage, after capture."""
        self._done = 0
        self.stage("passes")

    def before(self, step: Pass, graph: Graph) -> None:
        """Shows the pass name; a calibration pass shows its own progress bar instead."""
        self._done += 1
        self.tell(f"pass {self._done} of {self._passes}: {step.name}")
        if self._status is not None and isinstance(step, Calibrate):
            self._status.stop()

    def after(self, step: Pass, graph: Graph, outcome: Outcome) -> None:
        """Resumes the status line after a calibration pass."""
        if self._status is not None and isinstance(step, Calibrate):
            self._status.start()

    def end(self, graph: Graph) -> None:
        """Begins the code generation stage."""
        self.stage("code generation")


class _Teller(logging.Handler):
    """Shows log records in the status line."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.INFO)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.tell(f"capture: {record.getMessage()}")
