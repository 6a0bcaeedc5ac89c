"""A matmul with an epilogue: in one kernel, or the matmul followed by a separate kernel for the epilogue."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from codegen.epilogues import handed_over
from codegen.fused_expressions import triton_function
from codegen.kernels.fused_gemm import fused_gemm
from codegen.launching.launch import KernelCall
from codegen.templates.fused_expression import EXACT, MOST_OTHERS, padded, row_stride
from codegen.templates.gemm import GEMM, GemmOperands, GemmProblem
from codegen.templates.hopper import GLUON_TYPES, scale_columns, tile
from codegen.templates.limits import MULTIPROCESSORS
from codegen.templates.rounding import rounding
from codegen.templates.template import Family, Gpu, KernelOp, Template, ceil_div, first_broken, next_power_of_2
from qcompiler import numerics


@dataclass(frozen=True)
class FusedGemmProblem:
    """`expression(x[m, k] @ w[parts n, k].T, others)`, FP8 tiles [1, 128] and blocks [128, 128], on one device.

    Attributes:
        m: Rows of x, 1 or more.
        n: Columns of the result.
        k: Depth.
        parts: Stacked parts of w; the epilogue reads one sum for each.
        handed_bytes: Bytes per element of the type that the epilogue first rounds sums to.
        out_bytes: Bytes per element of the epilogue's result.
        others: Number of its other operands.
        bias: Whether a bias is added to the sums.
        block: Rows and columns of a block in which the result is quantized, or None.
        sms: Multiprocessors of the device.
        aligned: x and w start at multiples of 16 bytes.
        scale_columns: For one block of K, the scales of x are contiguous and start at a multiple of 16 bytes.
    """

    m: int
    n: int
    k: int
    parts: int
    handed_bytes: int = 2
    out_bytes: int = 2
    others: int = 0
    bias: bool = False
    block: tuple[int, int] | None = (1, 128)
    sms: int = MULTIPROCESSORS
    aligned: bool = True
    scale_columns: bool = True

    @property
    def gemm(self) -> GemmProblem:
        """The matmul alone."""
        rest = (self.sms, self.handed_bytes, self.aligned)
        return GemmProblem(self.m, self.parts * self.n, self.k, *rest, scale_columns=self.scale_columns)


@dataclass(frozen=True)
class FusedGemmConfig:
    """One compiled form of `codegen.kernels.fused_gemm`.

    Attributes:
        parts: Parts of the weight that a tile of the result is computed from.
        waves: Units of 64 rows and one part that each of the two consumers owns.
        stages: Steps of K in shared memory at once.
        group: Consecutive rows of tiles.
    """

    parts: int
    waves: int
    stages: int
    group: int = 16
    variant: ClassVar[str] = "fused"

    @property
    def rows(self) -> int:
        """Rows of a tile; it has 128 columns."""
        return 128 * self.waves // self.parts

    def shared_memory(self, handed_bytes: int = 2) -> int:
        """An upper estimate of the shared memory of a block of threads, in bytes: ring, scales, sums passed on."""
        ring = self.stages * ((self.rows + 128 * self.parts) * 128 + 4 * max(self.rows, 32))
        return ring + 2 * self.waves * 64 * 128 * handed_bytes + 1024

    def __str__(self) -> str:
        return f"{self.rows}x{self.parts}x128, {self.stages} stages, groups of {self.group}"


@dataclass(frozen=True)
class Separate:
    """The matmul, then a kernel for the epilogue; the matmul's configuration is chosen when it runs."""

    variant: ClassVar[str] = "separate"

    def __str__(self) -> str:
        return "separate kernels"


class FusedOperands(NamedTuple):
    """The tensors of a matmul with an epilogue.

    Attributes:
        expression: The epilogue, a fused expression without a reduction.
        gemm: The matmul's tensors; `out` is `[m, n]`, contiguous, of the epilogue's element type or an 8-bit one.
        others: Up to two tensors `[m, n]` with contiguous rows, or `[n]`.
        out_scale: FP32 `[m, ceil(n / 128)]`, any strides, if the result is quantized.
        profile: A name of `numerics.PROFILES`, for that quantization.
    """

    expression: str
    gemm: GemmOperands
    others: Sequence[Tensor] = ()
    out_scale: Tensor | None = None
    profile: str = numerics.DEFAULT_PROFILE


class FusedPace(NamedTuple):
    """Measured times on one device, in nanoseconds.

    Attributes:
        alone: For one step of K of a tile that is alone on its multiprocessor.
        busy: For one step of K of each of many tiles.
        tail: For the consumers' work per tile besides its steps.
        finish: For work that is not overlapped: the finishers' work on the last tile, and the launch.
        bandwidth: Bytes of weights read from memory per nanosecond.
    """

    alone: int
    busy: int
    tail: int
    finish: int
    bandwidth: int


class ExpressionPace(NamedTuple):
    """Minimum nanoseconds of one more kernel, and bytes per nanosecond of a kernel that runs only an epilogue."""

    launch: int
    bandwidth: int


Columns = tuple[FusedGemmConfig, int, int]
"""A form, the first column of its tiles, and their number."""


class FusedGemm(Template[FusedGemmConfig, FusedGemmProblem, FusedOperands]):
    """One kernel."""

    variant = FusedGemmConfig.variant
    overlaps = True

    def why_not(self, config: FusedGemmConfig, problem: FusedGemmProblem) -> str | None:
        """See `Template`."""
        shared, unit = config.shared_memory(problem.handed_bytes), self.limits.copy_alignment
        return first_broken(
            (
                (min(problem.m, problem.n, problem.k) < 1, f"{problem} has nothing to multiply"),
                (max(problem.m, problem.n * problem.parts, problem.k) >= 2**31, f"{problem} has a size beyond 32 bits"),
                (
                    config.parts != problem.parts,
                    f"its tiles use {config.parts} parts of the weight, here there are {problem.parts}",
                ),
                (
                    problem.parts > 1 and problem.n % 128 != 0,
                    f"each part of the weight must begin with a block of 128 rows, here they have {problem.n}",
                ),
                (
                    problem.others > MOST_OTHERS,
                    f"an epilogue may read {MOST_OTHERS} operands besides the sums, this one reads {problem.others}",
                ),
                (
                    problem.bias and config.parts * config.waves > 2,
                    "its consumers have no registers for a bias with two units of two parts",
                ),
                (
                    problem.block not in (None, (1, 128)),
                    f"a tile of the result holds whole blocks of [1, 128], not of {list(problem.block or ())}",
                ),
                (not problem.aligned, f"the copy engine needs operands that start at a multiple of {unit} bytes"),
                (problem.k % unit != 0, f"the copy engine needs K to be a multiple of {unit}, got {problem.k}"),
                (
                    not problem.scale_columns,
                    f"the copy engine needs the activation's scales in columns that start at multiples of {unit} bytes",
                ),
                (
                    shared > self.limits.shared_memory,
                    f"its ring and the passed sums of {problem.handed_bytes} bytes need {shared} bytes of shared "
                    f"memory, a block may use {self.limits.shared_memory}",
                ),
            )
        )

    def time(self, config: FusedGemmConfig, problem: FusedGemmProblem, pace: FusedPace) -> float:
        """See `Template`."""
        rounds = ceil_div(ceil_div(problem.m, config.rows) * ceil_div(problem.n, 128), problem.sms)
        step = pace.alone if rounds == 1 else pace.busy
        if 2 * problem.m <= config.rows:
            step *= 2  # as measured: the tensor cores do not hide the copies of a tile that is half empty
        weights = problem.parts * problem.n * problem.k / pace.bandwidth
        return (max(rounds * (ceil_div(problem.k, 128) * step + pace.tail), weights) + pace.finish) / 1e3

    def also(self, config: FusedGemmConfig) -> tuple[FusedGemmConfig, ...]:
        """The finer form, which other numbers of rows may need."""
        return (FINER[config],) if config in FINER else ()

    def calls(self, config: FusedGemmConfig, operands: FusedOperands) -> tuple[KernelCall, ...]:
        """See `Template`; one call, or two for columns of tiles of different forms."""
        x, n = operands.gemm.x, operands.gemm.out.shape[1]
        sms = self.limits.multiprocessors_of(x.device.index)
        problem = FusedGemmProblem(x.shape[0], n, x.shape[1], config.parts, sms=sms)
        launches = self.launches(config, problem)
        return tuple(self._call(form, operands, first, width, sms) for form, first, width in launches)

    def launches(self, config: FusedGemmConfig, problem: FusedGemmProblem) -> tuple[Columns, ...]:
        """The forms of the columns of tiles: one, or a finer one after the last full round, if that is faster.

        In the last round, some multiprocessors have no tile. A finer form divides its tiles among more of them.
        """
        height, width = ceil_div(problem.m, config.rows), ceil_div(problem.n, 128)
        first = height * width // problem.sms * problem.sms // height
        finer = FINER.get(config)
        if finer is not None and 0 < first < width:
            coarse, rest = replace(problem, n=128 * first), replace(problem, n=problem.n - 128 * first)
            both = self.time(config, coarse, FUSED[config]) + self.time(finer, rest, FUSED[finer])
            if both + SECOND_LAUNCH < self.time(config, problem, FUSED[config]):
                return (config, 0, first), (finer, first, width - first)
        return ((config, 0, width),)

    def _call(
        self, config: FusedGemmConfig, operands: FusedOperands, first: int, width: int, sms: int
    ) -> KernelCall:  # fmt: skip
        """The kernel for some columns of tiles."""
        expression, gemm, others, out_scale, profile = operands
        x, w, out, w_scale = gemm.x, gemm.w, gemm.out, gemm.w_scale
        (m, k), n = x.shape, out.shape[1]
        added, rows = padded(others), loaded_rows(config, m)
        arguments = (
            tile(x, rows), tile(w, 128), scale_columns(gemm.x_scale, max(rows, 32)), w_scale, gemm.bias,
            *added, out, out_scale, m, n, k, *w_scale.stride(), *map(row_stride, added),
            *((0, 0) if out_scale is None else out_scale.stride()), first, width,
        )  # fmt: skip
        handed, rest = handed_over(expression)
        constants = {
            "EXPRESSION": triton_function(rest, (), "gluon"), "PARTS": config.parts, "HANDED": GLUON_TYPES[handed],
            "WAVES": config.waves, "STAGES": config.stages, "GROUP": config.group, "WHOLE": n % 128 == 0,
            **rounding(profile, out.dtype),
        }  # fmt: skip
        programs = min(sms, ceil_div(m, config.rows) * width)
        return KernelCall(fused_gemm, programs, arguments, constants, EXACT)


def loaded_rows(config: FusedGemmConfig, m: int) -> int:
    """Rows of x that are loaded for a tile: a power of two of at least 16, all of the tile's unless m is smaller."""
    return min(config.rows, max(16, next_power_of_2(m)))


class SeparateKernels(Template[Separate, FusedGemmProblem, FusedOperands]):
    """Two kernels."""

    variant = Separate.variant

    def __init__(self, gpu: Gpu) -> None:
        super().__init__(gpu)
        self._gemm = GEMM.family(gpu)

    def why_not(self, config: Separate, problem: FusedGemmProblem) -> None:
        """See `Template`."""
        return None

    def time(self, config: Separate, problem: FusedGemmProblem, pace: ExpressionPace) -> float:
        """See `Template`."""
        elements = problem.m * problem.n
        read = elements * (problem.parts * problem.handed_bytes + problem.others * problem.out_bytes)
        written = elements * (problem.out_bytes if problem.block is None else 1)
        alone = self._gemm.time(self._gemm.choose(problem.gemm), problem.gemm)
        return alone + (pace.launch + (read + written) / pace.bandwidth) / 1e3

    def calls(self, config: Separate, operands: FusedOperands) -> tuple[KernelCall, ...]:
        """Returns no calls: `codegen.operators.fused_linear` runs the operators one by one."""
        return ()


FUSED_GEMM = KernelOp[FusedGemmConfig | Separate, FusedGemmProblem, FusedOperands]("matmul with an epilogue")
"""Paces are chosen to minimize the loss of the choices on the shapes of `benchmarks/epilogues.py`."""

FUSED = {
    FusedGemmConfig(2, 2, 3): FusedPace(720, 800, 3220, 1680, 3330),
    FusedGemmConfig(2, 1, 4): FusedPace(420, 460, 2080, 800, 3280),
    FusedGemmConfig(1, 2, 3): FusedPace(620, 870, 1900, 7260, 2430),
    FusedGemmConfig(1, 1, 4): FusedPace(500, 490, 1370, 800, 2410),
}
"""Measured on an H100, and with a lower weight on an H200."""

FINER = {form: finer for form in FUSED for finer in FUSED if (finer.parts, 2 * finer.rows) == (form.parts, form.rows)}
"""A form, and the form whose tiles have half of its rows."""

SECOND_LAUNCH = 4.0
"""Microseconds that a second form must save."""

FUSED_GEMM.add(FusedGemm, lambda problem: FUSED, on="sm_90a")
FUSED_GEMM.add(SeparateKernels, lambda problem: {Separate(): ExpressionPace(5120, 2780)}, on="sm_90a")


def why_separate(family: Family[Any, FusedGemmProblem, FusedOperands], problem: FusedGemmProblem) -> str:
    """Why the family chose separate kernels for a problem, in a sentence without a final period."""
    forms = [config for config in family.configs(problem) if config.variant == FusedGemmConfig.variant]
    refusals = {config: family.why_not(config, problem) for config in forms}
    possible = [config for config, why in refusals.items() if why is None]
    if not possible:
        mine = [why for config, why in refusals.items() if config.parts == problem.parts]
        return str((mine or list(refusals.values()))[-1])
    best = min(possible, key=lambda config: family.time(config, problem))
    separate, fused = family.time(Separate(), problem), family.time(best, problem)
    return f"estimated: {separate:.1f} us with separate kernels, {fused:.1f} us with one ({best})"
