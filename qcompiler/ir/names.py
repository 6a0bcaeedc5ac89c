"""The names of one graph's values: which are taken, and which is free next."""

from collections.abc import Iterable

from qcompiler.errors import QCompilerError, did_you_mean
from qcompiler.ir.op import Value


class Names(dict[str, Value]):
    """Name -> value. What `fresh` answers depends on the names alone, not on the order in which they were taken."""

    def __init__(self) -> None:
        super().__init__()
        self._free: dict[str, int] = {}  # stem -> n: every one of stem_1 … stem_(n - 1) is taken

    def fresh(self, name: str) -> str:
        """`name`, or the first free one of `name_1`, `name_2` …; `x_7`, when taken, goes on with `x_8`."""
        if name not in self:
            return name
        stem, tail = name.rpartition("_")[::2]
        stem, number = (stem, int(tail) + 1) if stem and tail.isdecimal() else (name, 1)
        free = self._free.get(stem, 1)
        while f"{stem}_{free}" in self:
            free += 1
        self._free[stem] = free
        number = max(number, free)
        while (candidate := f"{stem}_{number}") in self:
            number += 1
        return candidate

    def bind(self, value: Value, name: str) -> None:
        """Calls `value` by `name`, or by what is free."""
        value.name = self.fresh(name)
        self[value.name] = value

    def release(self, value: Value) -> None:
        """Frees the name of a value."""
        del self[value.name]
        stem, tail = value.name.rpartition("_")[::2]
        if tail.isdecimal() and stem in self._free:
            self._free[stem] = min(self._free[stem], max(1, int(tail)))

    def find(self, name: str) -> Value:
        """The value called `name`, with or without its `%`; QCompilerError with the nearest name when there is none."""
        if (value := self.get(name.removeprefix("%"))) is None:
            name = "%" + name.removeprefix("%")
            raise QCompilerError(f"no value is called {name}", fix=nearest(name, map(str, self.values())) or None)
        return value


def nearest(name: str, known: Iterable[str]) -> str:
    """`Did you mean 'x'?`, without the list of all that is known, which may be long; empty when nothing is near."""
    guess, mark, _ = did_you_mean(name, known).partition("? ")
    return f"{guess}?" if mark and guess.startswith("Did") else ""
