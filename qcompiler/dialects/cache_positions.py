"""Where the positions of a sequence are in its slot of a cache.

    all positions    0 1 2 3 4 5 6 7      position p is at p
    a ring of 4      8 5 6 7              position p is at p % 4, over position p - 4

A call appends its S tokens before it attends, so under a window of W positions a ring holds W - 1 + S or more. Then no
token of a call, padding on the right included, overwrites a position that a query of this call or of a later one reads:
the first query reads the W - 1 positions before the call, and the others read no earlier ones.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompiler.errors import InputError


def check_fit(cache: Sequence[Tensor], slots: Tensor, lengths: Tensor, new: int, capacity: int | None) -> None:
    """Raises InputError unless each row has a slot of the cache, and room for `new` positions after its length.

    Args:
        cache: Key `[slots, G, held, D]`, then the other tensors.
        slots: `[B]`.
        lengths: `[B]`.
        new: Positions that each row adds.
        capacity: Maximum length of a sequence if the cache is a ring; None if it is not.
    """
    count, held = cache[0].shape[0], cache[0].shape[2]
    limit = held if capacity is None else capacity
    for row, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        if not 0 <= slot < count:
            raise InputError(f"row {row} uses a slot that the cache does not have", got=slot, need=f"0..{count - 1}")
        if length < 0 or length + new > limit:
            raise InputError(
                f"row {row} does not fit into the cache",
                got=f"length {length} and {new} more positions",
                need=f"at most {limit} positions",
                fix="Use a larger capacity, or process fewer positions per call.",
            )


def check_call(held: int, new: int, capacity: int | None, window: int | None = 1) -> None:
    """Raises InputError if a call has more tokens than a ring allows.

    Args:
        held: Positions that a slot holds.
        new: Tokens of each row.
        capacity: As in `check_fit`.
        window: Number of latest positions that each token reads, its own included; None for all.
    """
    if capacity is None:
        return
    reach = window or capacity
    most = max(held - reach + 1, 0)
    if new > most:
        raise InputError(
            "a call has more tokens than the ring of a cache allows",
            got=f"{new} tokens per row",
            need=f"at most {most}, because the ring holds {held} positions and a token reads {reach}",
            fix="Cut the tokens into several calls, or run kv-cache with a larger 'chunk'.",
        )


def pieces(start: int, count: int, held: int) -> list[tuple[int, int, int]]:
    """Returns where `count` positions from `start` on are among the `held` of a slot.

    Returns:
        (first, count, number of positions in earlier pieces) of each piece: two if the positions wrap around, else one.
    """
    first = start % held
    if first + count <= held:
        return [(first, count, 0)]
    return [(first, held - first, 0), (0, first + count - held, held - first)]


def in_order(stored: Tensor, start: int, count: int) -> Tensor:
    """Returns `count` positions from `start` on of a slot `[G, held, …]`, as a view unless they wrap around."""
    parts = [stored.narrow(1, first, size) for first, size, _ in pieces(start, count, stored.shape[1])]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
