"""Which part of every parameter a rank holds: the one description of a layout that optimizer and checkpoints need."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from moescale.runtime.expert_parallel import ExpertParallel
from moescale.runtime.meshes import Meshes


@dataclass(frozen=True, kw_only=True)
class Part:
    """A rank's part of a parameter, a box in it."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    index: tuple[slice, ...]
    """One slice with explicit bounds per dim; empty where there is nothing left for this rank."""
    is_first_copy: bool = True
    """False where another rank holds the same part and speaks for it."""

    @property
    def first_index(self) -> int:
        """Index of the part's first element in the whole parameter, counted in row-major order."""
        strides = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        return sum(bounds.start * stride for bounds, stride in zip(self.index, strides, strict=True))

    @property
    def is_contiguous(self) -> bool:
        """Whether the part is a run of elements of the whole parameter: only the outermost dim is cut."""
        whole = [bounds == slice(0, size) for bounds, size in zip(self.index, self.shape, strict=True)]
        return all(whole[1:])


def whole(shape: torch.Size | tuple[int, ...]) -> Part:
    """The part of a rank that holds everything."""
    return Part(shape=tuple(shape), index=tuple(slice(0, size) for size in shape))


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of ``tensor``, sharing its memory; no gradient flows through."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def find_parts(model: nn.Module, meshes: Meshes | None) -> dict[str, Part]:
    """This rank's part of every parameter of a model to which a plan has been applied, by name."""
    if meshes is None:
        return {name: whole(parameter.shape) for name, parameter in model.named_parameters()}
    expert_prefixes = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ExpertParallel))
    parts = {}
    for name, parameter in model.named_parameters():
        part = _sharded(parameter)
        if expert_prefixes and name.startswith(expert_prefixes):
            part = _of_all_experts(part, meshes)
        parts[name] = part
    return parts


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


def _of_all_experts(part: Part, meshes: Meshes) -> Part:
    """``part`` of the experts of one ep rank, as a part of all experts."""
    ep = meshes.experts["ep"]
    num_local = part.shape[0]
    first = ep.get_local_rank() * num_local
    experts = slice(first + part.index[0].start, first + part.index[0].stop)
    return Part(
        shape=(num_local * ep.size(), *part.shape[1:]),
        index=(experts, *part.index[1:]),
        is_first_copy=part.is_first_copy,
    )
