"""A mapping that forgets what was not asked for lately, so that nothing kept for speed grows without bound."""

from collections.abc import Hashable
from typing import Generic, TypeVar

Kept = TypeVar("Kept")


class Recent(Generic[Kept]):
    """At least the `size` entries that were used last, and twice as many at most.

    Two generations: when the young one is full it becomes the old one, and an old entry that is asked for is young
    again. A hit in the young generation costs one look into a dict, less than what an exact order of use would.

    Args:
        size: Entries of a generation.

    Attributes:
        young: The young generation, for those who look there first where every microsecond counts.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.young: dict[Hashable, Kept] = {}
        self._old: dict[Hashable, Kept] = {}

    def get(self, key: Hashable) -> Kept | None:
        """What was put there, or None."""
        found = self.young.get(key)
        if found is None and (found := self._old.get(key)) is not None:
            self.put(key, found)
        return found

    def put(self, key: Hashable, value: Kept) -> None:
        """Keeps `value`, which is not None."""
        if len(self.young) >= self._size:
            self._old, self.young = self.young, {}
        self.young[key] = value

    def clear(self) -> None:
        """Forgets everything."""
        self.young, self._old = {}, {}

    def __len__(self) -> int:
        return len(self.young.keys() | self._old.keys())
