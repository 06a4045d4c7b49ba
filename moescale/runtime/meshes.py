"""Device meshes of a plan: one for parameters sharded over all ranks of a scale unit, one for routed experts.

Both arrange the same ranks in the same order, with neighbours along the innermost axis:

    dense    [dp_replicate, dp_shard]
    experts  [dp_replicate, edp, ep]     edp = dp_shard / ep: ranks that hold the same experts
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moescale.coordinates import Coordinates
from moescale.errors import ConfigError
from moescale.plan import ParallelPlan, is_supported, unsupported_sizes
from moescale.runtime.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Meshes:
    """The meshes of a plan, and one rank's coordinates in them."""

    dense: DeviceMesh
    """Axes dp_replicate, dp_shard."""
    experts: DeviceMesh
    """Axes dp_replicate, edp, ep."""
    coordinates: Coordinates
    """This rank's coordinates on all axes of the plan."""


def check_runnable(plan: ParallelPlan, ranks: Ranks) -> None:
    """Raise ConfigError unless this runtime supports every axis of the plan and ``ranks`` has the plan's size."""
    for axis, size in unsupported_sizes(plan.mesh).items():
        *most, last = (name for name in vars(plan.mesh) if is_supported(name))
        raise ConfigError(
            f"plan.mesh.{axis} ({size}) must be 1: this version runs the axes {', '.join(most)} and {last}; "
            f"compile the plan with {axis} 1"
        )
    if plan.runtime_gpus != ranks.size:
        raise ConfigError(
            f"plan.runtime_gpus ({plan.runtime_gpus}) must equal the number of processes ({ranks.size}); "
            f"start it with `torchrun --nproc-per-node {plan.runtime_gpus}`, or compile a plan with "
            f"--runtime-gpus {ranks.size}"
        )


def build_meshes(plan: ParallelPlan, ranks: Ranks, device_type: str) -> Meshes | None:
    """Build the meshes of ``plan``; None for a single rank, which has nothing to shard. A collective.

    FSDP2 over a single rank would still copy every weight and gradient: 28% of a step of four layers of the 16B model.
    """
    check_runnable(plan, ranks)
    if ranks.size == 1:
        return None
    mesh = plan.mesh
    coordinates = Coordinates(mesh=mesh, rank=ranks.rank)
    edp = coordinates.num_expert_data_ranks
    return Meshes(
        coordinates=coordinates,
        dense=init_device_mesh(
            device_type, (mesh.dp_replicate, mesh.dp_shard), mesh_dim_names=("dp_replicate", "dp_shard")
        ),
        experts=init_device_mesh(
            device_type, (mesh.dp_replicate, edp, mesh.ep), mesh_dim_names=("dp_replicate", "edp", "ep")
        ),
    )
