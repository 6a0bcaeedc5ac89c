"""One matmul for each group of rows, such as the tokens of an expert: kernels for many and for few rows per group.

    out[t] = x[t] @ w[g].T        for the rows t of group g, known only on the device

The choice uses sizes that the host knows, rows and groups; it never waits for the device.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from codegen.kernels.grouped_gemm import grouped_narrow, grouped_wide
from codegen.kernels.narrow_gemm import SCALE_BOX
from codegen.launching.launch import KernelCall
from codegen.templates.hopper import ONE_WARPGROUP, scale_columns, tile
from codegen.templates.template import KernelOp, Template, first_broken, next_power_of_2

MOST_GROUPS = 1024
"""Maximum number of groups: each block of threads holds all of them in shared memory."""

TABLE_ENTRY = 12
"""Bytes of a group in that table."""


class GroupedProblem(NamedTuple):
    """Matmuls of `groups` groups, in FP8 tiles [1, 128] and blocks [128, 128].

    Attributes:
        mean: Average rows per group.
        groups: Number of groups.
        out_bytes: Bytes per element of the result.
    """

    mean: float
    groups: int = 256
    out_bytes: int = 2


@dataclass(frozen=True)
class GroupedConfig:
    """One compiled kernel for grouped matmuls.

    Attributes:
        variant: `"wide"` has the rows as left operand of the tensor cores, `"narrow"` the weights.
        block_m: Rows of a tile; in the wide variant 64 for each consumer, 128 or 192.
        stages: Blocks of K in shared memory at once.
        order: Consecutive rows of tiles of one group.
    """

    variant: Literal["wide", "narrow"]
    block_m: int
    stages: int
    order: int = 16

    def __str__(self) -> str:
        return f"{self.variant} {self.block_m}x128x128, {self.stages} stages, groups of {self.order}"


class GroupedOperands(NamedTuple):
    """The tensors of a grouped matmul.

    Attributes:
        x: float8_e4m3fn `[rows, k]`, contiguous, rows and k at least 1.
        w: float8_e4m3fn `[groups, n, k]`, contiguous.
        out: bfloat16, float16 or float32 `[rows, n]`, contiguous.
        x_scale: FP32 `[rows, ceil(k / 128)]`, see `has_scale_columns`.
        w_scale: FP32 `[groups, ceil(n / 128), ceil(k / 128)]`, contiguous.
        offsets: int32 `[groups]`: the end row of each group; with a capacity, the number of rows of each group.
        capacity: Rows of x reserved for each group, if the groups are not contiguous.
    """

    x: Tensor
    w: Tensor
    out: Tensor
    x_scale: Tensor
    w_scale: Tensor
    offsets: Tensor
    capacity: int | None = None


class GroupedGemm(Template[GroupedConfig, GroupedProblem, GroupedOperands]):
    """The common part of the variants."""

    overlaps = True
    kernel: ClassVar[Any]

    def why_not(self, config: GroupedConfig, problem: GroupedProblem) -> str | None:
        """See `Template`."""
        shared, limit = self.shared_memory(config, problem.out_bytes, problem.groups), self.limits.shared_memory
        return first_broken(
            (
                (
                    problem.groups > MOST_GROUPS,
                    f"a block of threads can hold {MOST_GROUPS} groups, not {problem.groups}",
                ),
                (
                    shared > limit,
                    f"{config.stages} stages need {shared} bytes of shared memory, a block may use {limit}",
                ),
            )
        )

    def shared_memory(self, config: GroupedConfig, out_bytes: int = 2, groups: int = 256) -> int:
        """An upper estimate of the shared memory of a block, in bytes: the ring, the table, and the output tile."""
        ring = config.stages * ((config.block_m + 128) * 128 + 4 * max(config.block_m, SCALE_BOX))
        return ring + TABLE_ENTRY * table_size(groups) + 1024

    def time(self, config: GroupedConfig, problem: GroupedProblem, pace: tuple[float, float]) -> float:
        """A rank, not a time: the rows of the tile if the mean is within the `pace`, and a larger number otherwise.

        The pace is an interval of means, open at the lower end, in which the configuration was measured to be best.
        """
        low, high = pace
        return config.block_m if low < problem.mean <= high else 1024 - config.block_m

    def calls(self, config: GroupedConfig, operands: GroupedOperands) -> tuple[KernelCall, ...]:
        """See `Template`."""
        x, w, out, x_scale, w_scale, offsets, capacity = operands
        (rows, k), (groups, n, _) = x.shape, w.shape
        box = self.box(config)
        arguments = (
            tile(x, box), tile(w, 128), *self.out_box(out), scale_columns(x_scale, max(box, SCALE_BOX)),
            out, w_scale, offsets, groups, rows, n, k, capacity,
        )  # fmt: skip
        pipeline = {"STAGES": config.stages, "ORDER": config.order, "GROUPS": table_size(groups)}
        constants = {**self.consumers(config), **pipeline}
        programs = self.limits.multiprocessors_of(x.device.index)
        return (KernelCall(self.kernel, programs, arguments, constants, ONE_WARPGROUP),)

    def box(self, config: GroupedConfig) -> int:
        """Rows of x per copy."""
        return config.block_m

    def consumers(self, config: GroupedConfig) -> dict[str, int]:
        """Number of warpgroups that multiply, if it is a kernel parameter."""
        return {}

    def out_box(self, out: Tensor) -> tuple[Any, ...]:
        """The descriptor that the kernel stores through, if it has one."""
        return ()


class GroupedNarrow(GroupedGemm):
    """Few rows per group, as right operand of the tensor cores; two consumers share the 128 rows of the weight."""

    variant = "narrow"
    kernel = grouped_narrow


class GroupedWide(GroupedGemm):
    """Many rows per group; each consumer has 64, stored by the copy engine."""

    variant = "wide"
    kernel = grouped_wide

    def box(self, config: GroupedConfig) -> int:
        """See `GroupedGemm`."""
        return 64

    def consumers(self, config: GroupedConfig) -> dict[str, int]:
        """See `GroupedGemm`."""
        return {"CONSUMERS": config.block_m // 64}

    def out_box(self, out: Tensor) -> tuple[Any, ...]:
        """See `GroupedGemm`."""
        return (tile(out, 64),)

    def shared_memory(self, config: GroupedConfig, out_bytes: int = 2, groups: int = 256) -> int:
        """See `GroupedGemm`."""
        return super().shared_memory(config, out_bytes, groups) + config.block_m * 128 * out_bytes


def table_size(groups: int) -> int:
    """Groups of the table: a power of two, at least one for each lane of a warp."""
    return max(32, next_power_of_2(groups))


GROUPED_GEMM = KernelOp[GroupedConfig, GroupedProblem, GroupedOperands]("grouped GEMM")

NARROW = {
    GroupedConfig("narrow", 16, 8): (-1, 8),
    GroupedConfig("narrow", 32, 8): (8, 16),
    GroupedConfig("narrow", 64, 8): (16, 32),
}
WIDE = {
    GroupedConfig("wide", 128, 4): (160, 320),
    GroupedConfig("wide", 192, 4): (32, float("inf")),
}
"""Configuration -> the range of mean rows per group in which it is best on an H100.

Group sizes vary, so a narrow tile has room for twice the mean: a group that needs two tiles reads its weights twice.
Between 160 and 320 rows, two tiles of 128 hold a group about as often as two of 192, and the smaller ones are faster.
"""

GROUPED_GEMM.add(GroupedNarrow, lambda problem: NARROW, on="sm_90a")
GROUPED_GEMM.add(GroupedWide, lambda problem: WIDE, on="sm_90a")
