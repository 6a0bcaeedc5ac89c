"""Caches are bounded."""

from hypothesis import given
from hypothesis import strategies as st

from codegen.launching.recent import Recent


@given(st.lists(st.integers(0, 12), max_size=120), st.integers(1, 6))
def test_recent_keeps_the_last_used_and_at_most_twice_as_many(keys: list[int], size: int) -> None:
    recent: Recent[str] = Recent(size)
    used: list[int] = []
    for key in keys:
        found = recent.get(key)
        assert found is None or found == str(key)
        last = list(dict.fromkeys(reversed(used)))[:size]
        assert key not in last or found is not None
        if found is None:
            recent.put(key, str(key))
        used.append(key)
        assert len(recent) <= 2 * size
    recent.clear()
    assert len(recent) == 0
