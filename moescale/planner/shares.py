"""How much of the model's weights the fullest rank holds: an equal share, but for experts that do not divide."""

from __future__ import annotations

from moescale.config import ModelConfig
from moescale.plan import MeshShape, expert_shard_dim
from moescale.planner.workload import Workload


def rank_parameters(workload: Workload, mesh: MeshShape) -> float:
    """Weights whose gradient and optimizer state the fullest rank keeps."""
    routed = sum(kind.count * workload.layer_parameters(kind)[1] for kind in workload.layers)
    others = workload.parameters() - routed
    equal = mesh.pp * mesh.tp * mesh.dp_shard * mesh.cp
    return (others + routed * expert_padding(workload.config, mesh)) / equal


def local_parameters(workload: Workload, mesh: MeshShape, sharding: str) -> float:
    """Weights in the fullest rank's memory: with zero1 all dense ones, and all of its experts."""
    if sharding == "fsdp":
        return rank_parameters(workload, mesh)
    routed = sum(kind.count * workload.layer_parameters(kind)[1] for kind in workload.layers)
    return workload.parameters() - routed + routed / mesh.ep


def updated_parameters(workload: Workload, mesh: MeshShape, sharding: str) -> float:
    """Weights whose optimizer state the fullest rank keeps; with zero1 experts are split by whole experts."""
    if sharding == "fsdp":
        return rank_parameters(workload, mesh)
    routed = sum(kind.count * workload.layer_parameters(kind)[1] for kind in workload.layers)
    dense = workload.parameters() - routed
    if not routed:
        return dense / mesh.dp_shard
    local, shards = (workload.config.num_experts or 0) // mesh.ep, mesh.dp_shard // mesh.ep
    return dense / mesh.dp_shard + routed / mesh.ep * -(-local // shards) / local


def expert_padding(config: ModelConfig, mesh: MeshShape) -> float:
    """Routed experts' weights on the fullest rank over an equal share; what FSDP2 gathers is padded to as much."""
    if config.num_experts is None:
        return 1.0
    # gate_up is twice as large as down.
    return (2 * gate_up_padding(config, mesh) + _padding(config, mesh, config.hidden_size)) / 3


def gate_up_padding(config: ModelConfig, mesh: MeshShape) -> float:
    """The same of the stacked gate and up projections, the largest parameter."""
    return _padding(config, mesh, 2 * config.expert_intermediate_size)


def _padding(config: ModelConfig, mesh: MeshShape, rows: int) -> float:
    local, shards = (config.num_experts or 0) // mesh.ep, mesh.dp_shard * mesh.cp // mesh.ep
    size = (local, rows)[expert_shard_dim((local, rows), shards)]
    return -(-size // shards) * shards / size
