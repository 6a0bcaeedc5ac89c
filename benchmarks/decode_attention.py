"""Decode attention over a KV cache against the bandwidth of a copy, and against torch's flash attention.

    python benchmarks/decode_attention.py [--quick] [--out FOLDER]

32 query heads, 8 KV heads of 128, all rows of the same length, random data, CUDA-graph replays. The floor is the time
in which a copy would move the bytes of keys, values and scales. "chosen" is the configuration of the operator, "best"
the fastest of those tried: blocks of 64 or 128 positions, warps, stages, and half to four times the splits. Torch reads
a bfloat16 cache whose capacity is the context. Caches take turns, so that they are not read from L2.

`--quick` tries few configurations and needs less than a minute.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import harness
import torch
from memory_bound import copy_bandwidth
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from codegen.direct import kernels
from codegen.launching.timing import in_turns
from codegen.targets.hopper import HOPPER
from codegen.templates.attend_to_cache import ATTEND_TO_CACHE, AttendConfig, AttendOperands, AttendProblem

HEADS, GROUPS, SIZE = 32, 8, 128
BATCHES, CONTEXTS = (1, 16, 64), (1024, 2048, 8192)
DTYPES = (torch.bfloat16, torch.float8_e4m3fn)
L2_BYTES = 128 * 2**20
"""More than the L2 cache holds: caches that take turns have at least this many bytes together."""

QUICK = ((64, 4, 3), (128, 4, 2), (64, 8, 3))
ALL = tuple(product((64, 128), (4, 8), (2, 3, 4)))
"""Positions of a block, warps, and stages."""


class Work(NamedTuple):
    """One decode step over caches that take turns."""

    caches: list[list[Tensor]]
    query: Tensor
    new: Tensor
    slots: Tensor
    lengths: Tensor

    @property
    def bytes(self) -> int:
        """Bytes of one cache: its capacity is the context, so all of it is read."""
        return sum(tensor.nbytes for tensor in self.caches[0])


def work_of(batch: int, context: int, dtype: torch.dtype) -> Work:
    """Random caches of `context` positions, the last of which belongs to the new token."""
    one = 2 * batch * GROUPS * context * SIZE * dtype.itemsize
    caches = [_cache(batch, context, dtype) for _ in range(max(1, min(-(-L2_BYTES // one), 64)))]
    query = torch.randn(batch, HEADS, 1, SIZE, device="cuda", dtype=torch.bfloat16)
    new = torch.randn(batch, GROUPS, 1, SIZE, device="cuda", dtype=torch.bfloat16)
    slots = torch.arange(batch, device="cuda")
    return Work(caches, query, new, slots, torch.full_like(slots, context - 1))


def _cache(batch: int, context: int, dtype: torch.dtype) -> list[Tensor]:
    shape = (batch, GROUPS, context)
    made = [torch.randn(*shape, SIZE, device="cuda", dtype=torch.bfloat16).to(dtype) for _ in range(2)]
    scales = [torch.rand(shape, device="cuda") + 0.5 for _ in made] if dtype.itemsize == 1 else []
    return [*made, *scales]


def chosen_config(work: Work) -> AttendConfig:
    """The configuration that the operator uses."""
    key = work.caches[0][0]
    sizes = (key.shape[0], GROUPS, HEADS // GROUPS, 1, SIZE, SIZE, key.shape[2], key.element_size())
    return ATTEND_TO_CACHE.family(HOPPER).choose(AttendProblem(*sizes, None, HOPPER.limits.multiprocessors_of(0)))


def tried(chosen: AttendConfig, tiles: tuple[tuple[int, int, int], ...]) -> Iterator[AttendConfig]:
    """The chosen configuration, other tiles, and other numbers of splits."""
    counts = sorted({max(chosen.splits // 2, 1), chosen.splits, chosen.splits * 2, min(chosen.splits * 4, 128)})
    for (block_n, warps, stages), splits in product(tiles, counts):
        yield replace(chosen, block_n=block_n, warps=warps, stages=stages, splits=splits)


def launches(work: Work, config: AttendConfig) -> list[Callable[[], None]]:
    """A launch for each cache."""
    out = torch.empty(work.query.shape[0], 1, HEADS, SIZE, device="cuda", dtype=torch.bfloat16)

    def attend(cache: list[Tensor]) -> Callable[[], None]:
        tensors = (cache[0], cache[1], *(cache[2:] or (None, None)))
        operands = AttendOperands(work.query, tensors, work.slots, work.lengths, None, out, SIZE**-0.5)
        return lambda: ATTEND_TO_CACHE.family(HOPPER).launch(config, operands)

    return [attend(cache) for cache in work.caches]


def flash(work: Work) -> list[Callable[[], Tensor]]:
    """Torch's attention over each bfloat16 cache."""

    def attend(cache: list[Tensor]) -> Callable[[], Tensor]:
        key, value = cache
        return lambda: functional.scaled_dot_product_attention(work.query, key, value, enable_gqa=True)

    return [attend(cache) for cache in work.caches]


def appends(work: Work) -> list[Callable[[], None]]:
    """The kernel that appends one token, for each cache."""

    def append(cache: list[Tensor]) -> Callable[[], None]:
        return lambda: kernels.append_to_cache(cache, work.new, work.new, work.slots, work.lengths)

    return [append(cache) for cache in work.caches]


def measure(batch: int, context: int, dtype: torch.dtype, copy: float, quick: bool) -> dict[str, Any]:
    """One row of the table."""
    work = work_of(batch, context, dtype)
    chosen = chosen_config(work)
    runs: dict[Any, list[Callable[[], Any]]] = {
        config: launches(work, config) for config in (chosen, *tried(chosen, QUICK if quick else ALL))
    }
    runs["append"] = appends(work)
    got = kernels.attend_to_cache(
        work.caches[0], work.query, work.slots, work.lengths, None, None, None, SIZE**-0.5, None, None, None
    )
    error = None
    if dtype == torch.bfloat16:
        runs["flash"] = flash(work)
        error = harness.relative_error(got, runs["flash"][0]())
    times = in_turns(runs, rounds=3 if quick else 5, budget=1.0 if quick else 4.0)
    append, torch_time = times.pop("append"), times.pop("flash", None)
    best = min(times, key=lambda config: times[config])
    floor = work.bytes / copy / 1e3
    return {
        "batch": batch,
        "context": context,
        "cache": str(dtype).removeprefix("torch."),
        "floor us": floor,
        "chosen us": times[chosen],
        "of copy": floor / times[chosen],
        "chosen": _brief(chosen),
        "best us": times[best],
        "best of copy": floor / times[best],
        "best": _brief(best),
        "torch us": torch_time,
        "times faster": None if torch_time is None else torch_time / times[chosen],
        "append us": append,
        "error": error,
    }


def _brief(config: AttendConfig) -> str:
    """Positions of a block, warps, stages, and splits."""
    return f"{config.block_n}/{config.warps}/{config.stages}/{config.splits}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="try few configurations")
    quick = parser.parse_known_args()[0].quick
    torch.manual_seed(0)
    copy = copy_bandwidth()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        rows = [
            measure(batch, context, dtype, copy, quick) for dtype in DTYPES for batch in BATCHES for context in CONTEXTS
        ]
    title = (
        f"Decode attention, 32 query heads, 8 KV heads of 128 (block/warps/stages/splits); a copy moves {copy:.0f} GB/s"
    )
    harness.gpu_report("decode-attention", title, rows)


if __name__ == "__main__":
    main()
