"""The part of every parameter that a rank holds: the description of a layout for optimizer and checkpoints."""

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
    """The ranks that hold the same part of a parameter: those that share its update, and those that repeat it."""

    shards: dist.ProcessGroup | None
    """Group whose ranks each update their rows; None if one rank updates all rows."""
    replicas: dist.ProcessGroup | None
    """Group of the ranks that update the same rows; None if there is only one."""

    @property
    def num_shards(self) -> int:
        return 1 if self.shards is None else self.shards.size()

    @property
    def shard(self) -> int:
        """Index of this rank's shard."""
        return 0 if self.shards is None else self.shards.rank()

    @property
    def is_first_replica(self) -> bool:
        return self.replicas is None or self.replicas.rank() == 0

    def rows(self, num_rows: int, shard: int | None = None) -> slice:
        """Return the rows that ``shard`` (default: this rank's) updates of a tensor with ``num_rows``."""
        chunk = -(-num_rows // self.num_shards)
        start = min((self.shard if shard is None else shard) * chunk, num_rows)
        return slice(start, min(start + chunk, num_rows))


@dataclass(frozen=True, kw_only=True)
class Part:
    """A rank's part of a parameter, a box in it."""

    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    index: boxes.Box
    """The box; empty if this rank holds nothing."""
    is_first_copy: bool = True
    """False if another rank holds the same part and is the one that writes it."""
    sharing: Sharing | None = None
    """The ranks that hold the same part and share its update; None if this rank updates all of it."""

    @property
    def own(self) -> Part:
        """The part that this rank updates: its rows if the update is shared, else this part."""
        if self.sharing is None:
            return self
        first = self.index[0]
        rows = self.sharing.rows(first.stop - first.start)
        index = (slice(first.start + rows.start, first.start + rows.stop), *self.index[1:])
        return replace(self, index=index, is_first_copy=self.is_first_copy and self.sharing.is_first_replica)

    def own_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a view of the rows that this rank updates of a tensor laid out as this part."""
        return tensor if self.sharing is None else tensor[self.sharing.rows(tensor.shape[0])]

    @property
    def first_index(self) -> int:
        """Index of the part's first element in the whole parameter, counted in row-major order."""
        return boxes.first_index(self.index, self.shape)

    @property
    def is_contiguous(self) -> bool:
        """True if the part is a contiguous range of the whole parameter: only the outermost dim is sharded."""
        return boxes.is_contiguous(self.index, self.shape)


def whole(shape: torch.Size | tuple[int, ...]) -> Part:
    """Return the part of a rank that holds the whole parameter."""
    return Part(shape=tuple(shape), index=boxes.whole_box(shape))


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the local tensor of ``tensor``, detached, sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def find_parts(model: nn.Module, meshes: Meshes | None) -> dict[str, Part]:
    """Return this rank's part of every parameter, by name, of a model to which a plan has been applied."""
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
            chunk = -(-size // mesh.size(axis))  # as torch.chunk: the last ranks may get fewer rows, or none
            start = min(coordinate * chunk, size)
            index[placement.dim] = slice(start, min(start + chunk, size))
        else:
            is_first_copy = is_first_copy and coordinate == 0
    return Part(shape=tuple(parameter.shape), index=tuple(index), is_first_copy=is_first_copy)


def _of_all_experts(part: Part, coordinates: Coordinates) -> Part:
    """Return ``part``, which is of the experts of one ep rank, as a part of all experts."""
    num_local = part.shape[0]
    first = coordinates.expert_rank * num_local
    experts = slice(first + part.index[0].start, first + part.index[0].stop)
    return Part(
        shape=(num_local * coordinates.mesh.ep, *part.shape[1:]),
        index=(experts, *part.index[1:]),
        is_first_copy=part.is_first_copy,
    )
