"""Adds the passes that divide a model among the ranks of a mesh to a pipeline.

    sharded(pipeline("fp8_tile"), Mesh.parse("tp=2"), Sharding.parse("tp"), rank=1)
    ->  canonicalize; attention; dead-code; split-norms{…}; shard{mesh="tp=2", unit=[128, 128]}; collectives;
        partition{mesh="tp=2", rank=1}; merge-linears; fp8-tile; …

They run before the first pass that merges, quantizes, or makes caches, so that blocks, merged weights, fused kernels
and caches belong to one rank. Their unit is the block of the formats: codes and scales are cut together.
"""

from collections.abc import Sequence
from math import lcm

from passes.analyses.layers import EVERYTHING
from passes.attention.attention import Attention
from passes.attention.cache_scales import CacheScales
from passes.attention.latent_attention import LatentAttention
from passes.cleanup.canonicalize import Canonicalize
from passes.cleanup.dead_code import DeadCode
from passes.fusing.fuse_activation_quantize import FuseActivationQuantize
from passes.fusing.fuse_linear_scatter import FuseLinearScatter
from passes.fusing.fuse_reduce_quantize import FuseReduceQuantize
from passes.fusing.fuse_sum_quantize import FuseSumQuantize
from passes.fusing.gather_codes import GatherCodes
from passes.lowering.to_kernels import ToKernels
from passes.quantizing.calibrate import Calibrate
from passes.quantizing.quantize import Quantize
from passes.quantizing.scheme_options import SchemeOptions
from passes.sharding.collectives import Collectives
from passes.sharding.expert_parallel import ExpertParallel
from passes.sharding.gather_quantized import GatherQuantized
from passes.sharding.own_rows import OwnRows
from passes.sharding.partition import Partition
from passes.sharding.quantize_sums import QuantizeSums
from passes.sharding.sequence_parallel import SequenceParallel
from passes.smoothing.smoothquant import SmoothQuant
from qcompiler.errors import PassError
from qcompiler.ir import ALL, Format, Mesh
from qcompiler.pass_manager.pipeline import Pass, Pipeline
from qcompiler.schemes.divided import Divided
from qcompiler.schemes.tactics import Blocks, Sharding

PREPARING = (Canonicalize, Attention, LatentAttention, DeadCode)
"""Passes that run on the whole model if they come first; all others run on the program of one rank."""

OBSERVING = (Calibrate, SmoothQuant)
"""Passes that observe, or scale, activations of the whole model; they run before it is divided."""

CLEANUP: Sequence[tuple[type[Pass], Sequence[str], Pass]] = (
    (SequenceParallel, (ToKernels.name,), FuseLinearScatter()),
    (SequenceParallel, (GatherCodes.name, ToKernels.name), GatherQuantized()),
    (ExpertParallel, (ToKernels.name,), OwnRows()),
    (QuantizeSums, (FuseActivationQuantize.name,), FuseSumQuantize()),
    (Collectives, (FuseActivationQuantize.name,), FuseReduceQuantize()),
)
"""A pass of a tactic, and what runs if it is used, right after which pass of a scheme: the first that it has."""


def sharded(pipeline: Pipeline, mesh: Mesh, sharding: Sharding, rank: int) -> Pipeline:
    """The pipeline of one rank.

    Args:
        pipeline: The passes for the whole model.
        mesh: The mesh.
        sharding: The tactics.
        rank: The rank, from 0.

    Raises:
        PassError: A tactic uses an axis that the mesh does not have, or a pass needs calibration.
    """
    sharding.check(mesh)
    first = first_of_a_rank(pipeline)
    blocks = blocks_of(pipeline)
    placing = [step for tactic in sharding for step in tactic.placing(mesh, blocks)]
    rewriting = [step for tactic in sharding for step in tactic.rewriting(mesh, rank, blocks)]
    exchanging = [step for tactic in sharding for step in tactic.exchanging(mesh)]
    sending = [sent for tactic in sharding if (sent := tactic.sending()) is not None]
    steps = (*placing, Collectives(), *rewriting, *exchanging, Partition(str(mesh), rank), *sending)
    whole = Pipeline((*pipeline.passes[:first], *steps, *pipeline.passes[first:]))
    for early, places, cleanup in CLEANUP:
        place = next((place for place in places if place in whole), None)
        if place is not None and any(isinstance(step, early) for step in steps):
            whole = whole.insert_after(place, cleanup)
    return whole


def first_of_a_rank(pipeline: Pipeline) -> int:
    """The place of the first pass that runs on the program of one rank: after the passes that observe the model.

    Raises:
        PassError: A pass observes what an earlier one has merged or quantized.
    """
    steps = pipeline.passes
    first = next((at for at, step in enumerate(steps) if not isinstance(step, PREPARING)), len(steps))
    while first < len(steps) and isinstance(steps[first], OBSERVING):
        first += 1
    late = next((step for step in steps[first:] if isinstance(step, OBSERVING)), None)
    if late is not None:
        problem, fix = f"the pass '{late.name}' must observe the whole model", "Move it to the front of the pipeline."
        raise PassError(problem, got=f"it after '{steps[first].name}', which runs on one rank's part", fix=fix)
    return first


def check_whole(pipeline: Pipeline, has_data: bool) -> None:
    """Raises PassError if a pass would read whole weights of a checkpoint, of which a rank reads parts only.

    Args:
        pipeline: The passes.
        has_data: Whether there is calibration data, on which the whole model would run.
    """
    kinds = (*OBSERVING, CacheScales) if has_data else SmoothQuant
    if (reader := next((step for step in pipeline if isinstance(step, kinds)), None)) is not None:
        fix = "Load the model first, on each rank: qcompiler.compile(qcompiler.checkpoints.load_model(folder), …)."
        more = " Or calibrate it without a mesh, and give the statistics: calibration=qcompiler.Calibration.load(file)."
        raise PassError(
            "ranks that read parts of a folder's weights cannot run the whole model",
            got=f"the pass '{reader.name}'",
            fix=fix + more * (not any(isinstance(step, SmoothQuant) for step in pipeline)),
        )


def divided(pipeline: Pipeline, mesh: Mesh, sharding: Sharding, rank: int) -> Divided:
    """The instrument for the result of `sharded`, with the same arguments."""
    blocks = blocks_of(pipeline)
    steps = {str(each): (*each.placing(mesh, blocks), *each.rewriting(mesh, rank, blocks)) for each in sharding}
    return Divided(mesh, steps)


def blocks_of(pipeline: Pipeline) -> Blocks:
    """The blocks of all formats of a pipeline.

    Tiles of activations lie along the columns of the weight that multiplies them. A static scale is the same for all.
    Weights that are quantized already keep their scales, so that the format for other weights does not matter.
    """
    steps = [step for step in pipeline if isinstance(step, SchemeOptions)]
    tiles = [1 if step.static else _block(step.x_format)[1] for step in steps]
    rows, columns = ([_block(step.w_format)[axis] for step in steps] for axis in (0, 1))
    unit = _together(rows), _together([*columns, *tiles])
    stored = _together(tiles) if ALL in unit else 0
    reads = {(step.x_format, step.layers) for step in steps if isinstance(step, Quantize)}
    same = next(iter(reads)) if len(reads) == 1 else ()
    return Blocks(unit, stored, any(step.layers != EVERYTHING for step in steps), *same)


def _block(form: Format) -> tuple[int, int]:
    """The block of a format; a scale of the tensor spans all of it."""
    return (ALL, ALL) if form.tensor_scale else form.block


def _together(sizes: list[int]) -> int:
    return ALL if ALL in sizes else lcm(*sizes)
