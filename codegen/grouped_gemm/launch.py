"""The kernels of the grouped product: their configurations, the choice of one, and its launch.

    out[t] = x[t] @ w[g].T        for the rows t of group g, which the device alone knows

The choice is made from sizes that the host knows, rows and groups: it never waits for the device.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from triton.experimental.gluon.nvidia import hopper

from codegen.gemm.launch import gluon_layout, scale_layout
from codegen.gemm.tiling import ceil_div
from codegen.kernels.grouped_gemm import grouped_narrow, grouped_wide
from codegen.kernels.narrow_gemm import SCALE_BOX
from codegen.launching.launch import descriptor, launch, multiprocessors

MOST_GROUPS = 1024
"""Groups at most: each block of threads holds all of them in shared memory."""

TABLE_ENTRY = 12
"""Bytes of a group in that table."""


@dataclass(frozen=True)
class GroupedConfig:
    """One compiled kernel for grouped products.

    Attributes:
        variant: `"wide"` has the rows on the left of the tensor cores, `"narrow"` the weights.
        block_m: Rows of a tile; in the wide variant 64 for each consumer, 128 or 192.
        stages: Blocks of K that are in shared memory at one time.
        order: Rows of tiles of one group that follow each other in time.
    """

    variant: Literal["wide", "narrow"]
    block_m: int
    stages: int
    order: int = 16

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return self.block_m // 64 if self.variant == "wide" else 2

    @property
    def box(self) -> int:
        """Rows of x that one copy brings."""
        return 64 if self.variant == "wide" else self.block_m

    @property
    def scale_box(self) -> int:
        """Scales of x that one copy brings."""
        return max(self.box, SCALE_BOX)

    def shared_memory(self, out_bytes: int = 2, groups: int = 256) -> int:
        """An upper estimate of the shared memory of a block, in bytes: the ring, the output tile, the table."""
        ring = self.stages * ((self.block_m + 128) * 128 + 4 * max(self.block_m, SCALE_BOX))
        out = self.block_m * 128 * out_bytes if self.variant == "wide" else 0
        return ring + out + TABLE_ENTRY * table_size(groups) + 1024

    def __str__(self) -> str:
        return f"{self.variant} {self.block_m}x128x128, {self.stages} stages, groups of {self.order}"


NARROW = tuple(GroupedConfig("narrow", rows, 8) for rows in (16, 32, 64))
WIDE, TALL = GroupedConfig("wide", 128, 4), GroupedConfig("wide", 192, 4)
CONFIGS = (*NARROW, WIDE, TALL)
"""Those that `choose_grouped` answers with; compiled ahead of time and tested."""

TWO_WIDE_TILES = (160, 320)
"""Rows of a group, on average, that two tiles of 128 hold about as often as two of 192; the smaller ones are faster."""


def choose_grouped(mean: float, out_bytes: int = 2) -> GroupedConfig:
    """The configuration for groups of so many rows on average.

    Groups differ, so a narrow tile has room for twice the mean: a group that needs two reads its weights twice. Beside
    the tall tile of an output of 4 bytes no ring has room.
    """
    low, high = TWO_WIDE_TILES
    wide = WIDE if out_bytes > 2 or low < mean <= high else TALL
    return next((config for config in NARROW if 2 * mean <= config.block_m), wide)


def table_size(groups: int) -> int:
    """Groups of the table: a power of two, one for each lane of a warp at least."""
    return max(32, 1 << (groups - 1).bit_length())


def launch_grouped(
    config: GroupedConfig, x: Tensor, w: Tensor, out: Tensor, x_scale: Tensor, w_scale: Tensor, offsets: Tensor,
    capacity: int | None = None,
) -> None:  # fmt: skip
    """Launches one configuration on the current CUDA stream, unchecked.

    Args:
        config: Any.
        x: float8_e4m3fn `[rows, k]`, contiguous, rows and k at least 1.
        w: float8_e4m3fn `[groups, n, k]`, contiguous.
        out: bfloat16, float16 or float32 `[rows, n]`, contiguous.
        x_scale: FP32 `[rows, ceil(k / 128)]`, see `has_scale_columns`.
        w_scale: FP32 `[groups, ceil(n / 128), ceil(k / 128)]`, contiguous.
        offsets: int32 `[groups]`: the row behind each group's last; with a capacity, the rows of each group.
        capacity: Rows of x that each group has room for, when the groups do not follow each other tightly.
    """
    (rows, k), (groups, n, _) = x.shape, w.shape
    wide, box = config.variant == "wide", config.box
    blocks = x_scale.shape[1]
    stride = x_scale.stride(1) if blocks > 1 else ceil_div(rows, 4) * 4
    arguments: list[Any] = [
        descriptor(hopper.TensorDescriptor, x, [rows, k], k, [box, 128], gluon_layout(box, 128, x.dtype)),
        descriptor(hopper.TensorDescriptor, w, [groups * n, k], k, [128, 128], gluon_layout(128, 128, w.dtype)),
    ]
    if wide:
        layout = gluon_layout(64, 128, out.dtype)
        arguments.append(descriptor(hopper.TensorDescriptor, out, [rows, n], n, [64, 128], layout))
    scale_box = [1, config.scale_box]
    arguments += [
        descriptor(hopper.TensorDescriptor, x_scale, [blocks, rows], stride, scale_box, scale_layout()),
        out, w_scale, offsets, groups, rows, n, k, capacity,
    ]  # fmt: skip
    constants = grouped_constants(config, groups)
    kernel = grouped_wide if wide else grouped_narrow
    what = (config, out.dtype, x.device.index, constants["GROUPS"], n, capacity is None)
    programs = multiprocessors(x.device.index)
    launch(kernel, programs, arguments, constants, {"num_warps": 4}, (out, w_scale, offsets), what)


def grouped_constants(config: GroupedConfig, groups: int) -> dict[str, Any]:
    """What the compiler of a grouped kernel knows."""
    first = {"CONSUMERS": config.consumers} if config.variant == "wide" else {}
    return {**first, "STAGES": config.stages, "ORDER": config.order, "GROUPS": table_size(groups)}
