"""Adds the passes that divide a model among the ranks of a mesh to a pipeline.

    sharded(pipeline("fp8_tile"), Mesh.parse("tp=2"), "tp", rank=1)
    ->  canonicalize; attention; dead-code; shard{mesh="tp=2", unit=[128, 128]}; collectives;
        partition{mesh="tp=2", rank=1}; merge-linears; fp8-tile; …

They run before the first pass that merges, quantizes, or makes caches, so that blocks, merged weights, fused kernels
and caches belong to one rank. Their unit is the block of the formats: codes and scales are cut together.
"""

from math import lcm

from passes.analyses.layers import EVERYTHING
from passes.attention.attention import Attention
from passes.attention.cache_scales import CacheScales
from passes.attention.latent_attention import LatentAttention
from passes.cleanup.canonicalize import Canonicalize
from passes.cleanup.dead_code import DeadCode
from passes.quantizing.calibrate import Calibrate
from passes.quantizing.scheme_options import SchemeOptions
from passes.sharding.collectives import Collectives
from passes.sharding.partition import Partition
from passes.sharding.shard import Shard
from qcompiler.errors import PassError
from qcompiler.ir import ALL, Format, Mesh
from qcompiler.pass_manager.pipeline import Pipeline

PREPARING = (Canonicalize, Attention, LatentAttention, DeadCode)
"""Passes that run on the whole model if they come first; all others run on the program of one rank."""


def sharded(pipeline: Pipeline, mesh: Mesh, sharding: str, rank: int) -> Pipeline:
    """The pipeline of one rank.

    Args:
        pipeline: The passes for the whole model.
        mesh: The mesh.
        sharding: The tactic: "tp".
        rank: The rank, from 0.

    Raises:
        PassError: The tactic is unknown, the mesh does not have its axis, or a pass needs calibration.
    """
    if any(isinstance(step, Calibrate | CacheScales) for step in pipeline):
        fix = "Choose a scheme whose scales are computed in each call, such as fp8_tile."
        raise PassError("a sharded model cannot be calibrated", got=f"the pipeline '{pipeline}'", fix=fix)
    grid = str(mesh)
    tactic: object = sharding
    named = any(isinstance(step, SchemeOptions) and step.layers != EVERYTHING for step in pipeline)
    shard = Shard(grid, tactic, unit_of(pipeline), named)  # type: ignore[arg-type]  # checked by the pass
    steps = (shard, Collectives(), Partition(grid, rank))
    late = (at for at, step in enumerate(pipeline) if not isinstance(step, PREPARING))
    first = next(late, len(pipeline))
    return Pipeline((*pipeline.passes[:first], *steps, *pipeline.passes[first:]))


def unit_of(pipeline: Pipeline) -> tuple[int, int]:
    """Rows and columns of a weight that no cut may separate: the blocks of all formats of a pipeline.

    Tiles of activations lie along the columns of the weight that multiplies them.
    """
    rows, columns = [1], [1]
    for step in pipeline:
        if isinstance(step, SchemeOptions):
            rows.append(_block(step.w_format)[0])
            columns += [_block(step.w_format)[1], _block(step.x_format)[1]]
    return _together(rows), _together(columns)


def _block(form: Format) -> tuple[int, int]:
    """The block of a format; a scale of the tensor spans all of it."""
    return (ALL, ALL) if form.tensor_scale else form.block


def _together(sizes: list[int]) -> int:
    return ALL if ALL in sizes else lcm(*sizes)
