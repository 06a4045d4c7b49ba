"""How much of the model's weights the fullest rank holds: an equal share, but for experts that do not divide."""

from __future__ import annotations

from moescale.config import ModelConfig
from moescale.plan import MeshShape, expert_shard_dim
from moescale.planner.workload import Weights


def rank_parameters(weights: Weights, mesh: MeshShape) -> float:
    """Weights whose gradient and optimizer state the fullest rank keeps."""
    return (weights.others + weights.routed * expert_padding(weights.config, mesh)) / mesh.copy_gpus


def local_parameters(weights: Weights, mesh: MeshShape, sharding: str) -> float:
    """Weights in the fullest rank's memory: with zero1 all dense ones, and all of its experts."""
    if sharding == "fsdp":
        return rank_parameters(weights, mesh)
    return weights.others + weights.routed / mesh.ep


def updated_parameters(weights: Weights, mesh: MeshShape, sharding: str) -> float:
    """Weights whose optimizer state the fullest rank keeps; with zero1 experts are split by whole experts."""
    if sharding == "fsdp":
        return rank_parameters(weights, mesh)
    if not weights.routed:
        return weights.others / mesh.dp_shard
    local, shards = (weights.config.num_experts or 0) // mesh.ep, mesh.dp_shard // mesh.ep
    return weights.others / mesh.dp_shard + weights.routed / mesh.ep * -(-local // shards) / local


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
