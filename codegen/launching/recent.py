"""A mapping that drops entries not used recently, so that caches stay bounded."""

from collections.abc import Hashable
from typing import Generic, TypeVar

Kept = TypeVar("Kept")


class Recent(Generic[Kept]):
    """Holds at least the `size` most recently used entries, and at most twice as many.

    It has two generations: a full young generation becomes the old one, and an old entry that is used moves back to the
    young one. A hit in the young generation costs one dict lookup, less than an exact LRU order.

    Args:
        size: Entries of a generation.

    Attributes:
        young: The young generation, for callers that check it first when every microsecond counts.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.young: dict[Hashable, Kept] = {}
        self._old: dict[Hashable, Kept] = {}

    def get(self, key: Hashable) -> Kept | None:
        """The stored value, or None."""
        found = self.young.get(key)
        if found is None and (found := self._old.get(key)) is not None:
            self.put(key, found)
        return found

    def put(self, key: Hashable, value: Kept) -> None:
        """Stores `value`, which must not be None."""
        if len(self.young) >= self._size:
            self._old, self.young = self.young, {}
        self.young[key] = value

    def clear(self) -> None:
        """Forgets everything."""
        self.young, self._old = {}, {}

    def __len__(self) -> int:
        return len(self.young.keys() | self._old.keys())
