"""The mesh axes in their order, and what follows from all of them: the meshes, and what a mesh divides."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

from moescale.plan import MeshShape, is_supported
from moescale.planner.axes.axis import Axis, Division, MicroBatch
from moescale.planner.axes.cp import ContextParallel
from moescale.planner.axes.dp_replicate import ReplicaParallel
from moescale.planner.axes.dp_shard import ShardedDataParallel
from moescale.planner.axes.ep import ExpertParallel
from moescale.planner.axes.pp import PipelineParallel
from moescale.planner.axes.tp import TensorParallel
from moescale.planner.problem import Problem
from moescale.planner.request import IN_COMPUTE_DTYPE, Gemms

DP_REPLICATE = ReplicaParallel()
PP = PipelineParallel()
TP = TensorParallel()
CP = ContextParallel()
EP = ExpertParallel()
DP_SHARD = ShardedDataParallel()

AXES: tuple[Axis, ...] = (DP_REPLICATE, PP, TP, CP, EP, DP_SHARD)
"""From the one whose size is chosen first to the last, which takes the ranks that are left. Decides between equals."""
BY_CLAIM: tuple[Axis, ...] = (EP, TP, CP, PP, DP_SHARD, DP_REPLICATE)
"""As they claim compute to hide beneath: axes that only certain operators hide come before those that any hides, and
what is once a step comes last."""


def meshes(problem: Problem) -> Iterator[MeshShape]:
    """Return every mesh of the request's GPUs that the model's sizes divide into, in the order of preference."""
    return _extended(problem, MeshShape(), problem.request.runtime_gpus, AXES)


def _extended(problem: Problem, mesh: MeshShape, left: int, axes: tuple[Axis, ...]) -> Iterator[MeshShape]:
    if not axes:
        if left == 1:
            yield mesh
        return
    axis, inner = axes[0], axes[1:]
    can_grow = problem.request.allow_unsupported or is_supported(axis.name)
    for size in axis.sizes(problem, mesh, left) if can_grow else (1,):
        if problem.request.allows(axis.name, size):
            extended = dataclasses.replace(mesh, **{axis.name: size})
            yield from _extended(problem, extended, left // size if axis.takes_ranks else left, inner)


@functools.cache
def division_of(mesh: MeshShape) -> Division:
    """Return into how many shares ``mesh`` divides each part of the work."""
    return Division(
        **{
            part.name: math.prod(getattr(mesh, axis.name) for axis in AXES if part.name in axis.divides)
            for part in dataclasses.fields(Division)
        }
    )


def micro_batch(
    problem: Problem,
    mesh: MeshShape,
    sequences: int,
    sharding: str,
    gradient: str,
    gemms: Gemms = IN_COMPUTE_DTYPE,
) -> MicroBatch:
    """Return what the axes are told of a micro-batch of ``sequences`` on ``mesh``."""
    return MicroBatch(
        problem=problem,
        mesh=mesh,
        division=division_of(mesh),
        sequences=sequences,
        sharding=sharding,
        gradient=gradient,
        gemms=gemms,
    )
