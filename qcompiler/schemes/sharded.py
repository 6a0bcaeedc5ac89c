"""Adds the passes that divide a model among the ranks of a mesh to a pipeline.

    sharded(pipeline("fp8_tile"), Mesh.parse("tp=2"), Sharding.parse("tp"), rank=1)
    ->  canonicalize; attention; dead-code; shard{mesh="tp=2", unit=[128, 128]}; collectives;
        partition{mesh="tp=2", rank=1}; merge-linears; fp8-tile; …

They run before the first pass that merges, quantizes, or makes caches, so that blocks, merged weights, fused kernels
and caches belong to one rank. Their unit is the block of the formats: codes and scales are cut together.
"""

from collections.abc import Mapping
from math import lcm

from passes.analyses.layers import EVERYTHING
from passes.attention.attention import Attention
from passes.attention.cache_scales import CacheScales
from passes.attention.latent_attention import LatentAttention
from passes.cleanup.canonicalize import Canonicalize
from passes.cleanup.dead_code import DeadCode
from passes.lowering.to_kernels import ToKernels
from passes.quantizing.calibrate import Calibrate
from passes.quantizing.scheme_options import SchemeOptions
from passes.sharding.collectives import Collectives
from passes.sharding.expert_parallel import ExpertParallel
from passes.sharding.gather_quantized import GatherQuantized
from passes.sharding.own_rows import OwnRows
from passes.sharding.partition import Partition
from passes.sharding.sequence_parallel import SequenceParallel
from qcompiler.errors import PassError
from qcompiler.ir import ALL, Format, Mesh
from qcompiler.pass_manager.pipeline import Pass, Pipeline
from qcompiler.schemes.tactics import Sharding

PREPARING = (Canonicalize, Attention, LatentAttention, DeadCode)
"""Passes that run on the whole model if they come first; all others run on the program of one rank."""

CLEANUP: Mapping[type[Pass], Pass] = {ExpertParallel: OwnRows(), SequenceParallel: GatherQuantized()}
"""Pass of a tactic -> what runs after the quantizing passes if it is used."""


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
    if any(isinstance(step, Calibrate | CacheScales) for step in pipeline):
        fix = "Choose a scheme whose scales are computed in each call, such as fp8_tile."
        raise PassError("a sharded model cannot be calibrated", got=f"the pipeline '{pipeline}'", fix=fix)
    sharding.check(mesh)
    named = any(isinstance(step, SchemeOptions) and step.layers != EVERYTHING for step in pipeline)
    unit = unit_of(pipeline)
    placing = [step for tactic in sharding if (step := tactic.placing(mesh, unit, named)) is not None]
    rewriting = [step for tactic in sharding if (step := tactic.rewriting(mesh, rank)) is not None]
    steps = (*placing, Collectives(), *rewriting, Partition(str(mesh), rank))
    late = (at for at, step in enumerate(pipeline) if not isinstance(step, PREPARING))
    first = next(late, len(pipeline))
    whole = Pipeline((*pipeline.passes[:first], *steps, *pipeline.passes[first:]))
    after = [late for early, late in CLEANUP.items() if any(isinstance(step, early) for step in rewriting)]
    return whole.insert_after(ToKernels.name, *after) if ToKernels.name in whole else whole


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
