"""The value names of one graph, and unique new names."""

from collections.abc import Iterable

from qcompiler.errors import QCompilerError, did_you_mean
from qcompiler.ir.op import Value


class Names(dict[str, Value]):
    """Name -> value. The result of `fresh` depends only on the names in use, not on the order of their creation."""

    def __init__(self) -> None:
        super().__init__()
        self._free: dict[str, int] = {}  # stem -> n: stem_1 … stem_(n - 1) are all taken

    def fresh(self, name: str) -> str:
        """`name`, or the first free name of `name_1`, `name_2` …; if `x_7` is taken, `x_8` is next."""
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
        """Names `value` `name`, made unique if it is taken."""
        value.name = self.fresh(name)
        self[value.name] = value

    def release(self, value: Value) -> None:
        """Frees the name of a value."""
        del self[value.name]
        stem, tail = value.name.rpartition("_")[::2]
        if tail.isdecimal() and stem in self._free:
            self._free[stem] = min(self._free[stem], max(1, int(tail)))

    def find(self, name: str) -> Value:
        """The value called `name`, with or without `%`; raises QCompilerError with the closest name if missing."""
        if (value := self.get(name.removeprefix("%"))) is None:
            name = "%" + name.removeprefix("%")
            raise QCompilerError(f"there is no value {name}", fix=nearest(name, map(str, self.values())) or None)
        return value


def nearest(name: str, known: Iterable[str]) -> str:
    """`Did you mean 'x'?` without the list of all known names; empty if no name is close."""
    guess, mark, _ = did_you_mean(name, known).partition("? ")
    return f"{guess}?" if mark and guess.startswith("Did") else ""
