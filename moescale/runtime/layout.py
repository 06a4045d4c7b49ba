"""Which part of every parameter a rank holds: the one description of a layout that optimizer and checkpoints need."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moescale import boxes
from moescale.coordinates import Coordinates
from moescale.models.blocks.moe import RoutedExperts
from moescale.runtime.meshes import Meshes


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """The ranks that hold the same part of a parameter: who shares its update, and who repeats that."""

    shards: dist.ProcessGroup | None
    """Every rank updates its rows; None where one rank updates all."""
    replicas: dist.ProcessGroup | None
    """Ranks that update the same rows; None where there is one."""

    @property
    def num_shards(self) -> int:
        return 1 if self.shards is None else self.shards.size()

    @property
    def shard(self) -> int:
        """This rank's place among the shards."""
        return 0 if self.shards is None else self.shards.rank()

    @property
    def is_first_replica(self) -> bool:
        return self.replicas is None or self.replicas.rank() == 0

    def rows(self, num_rows: int, shard: int | None = None) -> slice:
        """The rows that ``shard`` (this rank) updates of a tensor with ``num_rows``."""
        chunk = -(-num_rows // self.num_shards)
        start = min((self.shard if shard is None else shard) * chunk, num_rows)
        return slice(start, min(start + chunk, num_rows))


@dataclass(frozen=True, kw_only=True)
class Part:
    """A rank's part of a parameter, a box in it."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    index: boxes.Box
    """Empty where there is nothing left for this rank."""
    is_first_copy: bool = True
    """False where another rank holds the same part and speaks for it."""
    sharing: Sharing | None = None
    """The ranks that hold the same part and share its update; None where this rank updates all of it."""

    @property
    def own(self) -> Part:
        """What of this part this rank updates: its rows, where the update is shared."""
        if self.sharing is None:
            return self
        first = self.index[0]
        rows = self.sharing.rows(first.stop - first.start)
        index = (slice(first.start + rows.start, first.start + rows.stop), *self.index[1:])
        return replace(self, index=index, is_first_copy=self.is_first_copy and self.sharing.is_first_replica)

    def own_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of a tensor laid out as this part, what this rank updates; shares its memory."""
        return tensor if self.sharing is None else tensor[self.sharing.rows(tensor.shape[0])]

    @property
    def first_index(self) -> int:
        """Index of the part's first element in the whole parameter, counted in row-major order."""
        return boxes.first_index(self.index, self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether the part is a run of elements of the whole parameter: only the outermost dim is cut."""
        return boxes.is_contiguous(self.index, self.shape)


def whole(shape: torch.Size | tuple[int, ...]) -> Part:
    """The part of a rank that holds everything."""
    return Part(shape=tuple(shape), index=boxes.whole_box(shape))


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of ``tensor``, sharing its memory; no gradient flows through."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def find_parts(model: nn.Module, meshes: Meshes | None) -> dict[str, Part]:
    """This rank's part of every parameter of a model to which a plan has been applied, by name."""
    if meshes is None:
        return {name: whole(parameter.shape) for name, parameter in model.named_parameters()}
    expert_prefixes = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, RoutedExperts) and module.dispatcher.num_ranks > 1
    )
    is_sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    replicas = _group(meshes.dense["dp_replicate"])
    sharing_of_dense = Sharing(shards=_group(meshes.dense["dp_shard"]), replicas=replicas)
    sharing_of_experts = Sharing(shards=_group(meshes.experts["edp"]), replicas=replicas)
    parts = {}
    for name, parameter in model.named_parameters():
        part, sharing = _sharded(parameter), sharing_of_dense
        if expert_prefixes and name.startswith(expert_prefixes):
            part, sharing = _of_all_experts(part, meshes.coordinates), sharing_of_experts
        parts[name] = part if is_sharded else replace(part, sharing=sharing)
    return parts


def _group(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    return None if mesh.size() == 1 else mesh.get_group()


def _sharded(parameter: torch.Tensor) -> Part:
    if not isinstance(parameter, DTensor):
        return whole(parameter.shape)
    index = [slice(0, size) for size in parameter.shape]
    is_first_copy = True
    mesh = parameter.device_mesh
    for axis, placement in enumerate(parameter.placements):
        coordinate = mesh.get_local_rank(axis)
        if isinstance(placement, Shard):
            assert index[placement.dim] == slice(0, parameter.shape[placement.dim]), "a dim is sharded once"
            size = parameter.shape[placement.dim]
            chunk = -(-size // mesh.size(axis))  # as torch.chunk: the last ranks may get less, or nothing
            start = min(coordinate * chunk, size)
            index[placement.dim] = slice(start, min(start + chunk, size))
        else:
            is_first_copy = is_first_copy and coordinate == 0
    return Part(shape=tuple(parameter.shape), index=tuple(index), is_first_copy=is_first_copy)


def _of_all_experts(part: Part, coordinates: Coordinates) -> Part:
    """``part`` of the experts of one ep rank, as a part of all experts."""
    num_local = part.shape[0]
    first = coordinates.expert_rank * num_local
    experts = slice(first + part.index[0].start, first + part.index[0].stop)
    return Part(
        shape=(num_local * coordinates.mesh.ep, *part.shape[1:]),
        index=(experts, *part.index[1:]),
        is_first_copy=part.is_first_copy,
    )
