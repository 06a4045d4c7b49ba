"""Builds the model on the meta device, shards it by the plan, allocates it, and loads or initializes weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from moescale.boxes import whole_box
from moescale.config import ModelConfig
from moescale.convert.checkpoint_import import import_checkpoint
from moescale.coordinates import Coordinates
from moescale.models.lora import is_adapter
from moescale.models.transformer import (
    Transformer,
    build_on_meta,
    in_drawing_order,
    initialize_part,
    named_weights,
)
from moescale.plan import ParallelPlan
from moescale.runtime.layout import Part, find_parts, local_tensor
from moescale.runtime.mapping import apply_plan
from moescale.runtime.meshes import build_meshes
from moescale.runtime.ranks import Ranks

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Dtype of the model's weights, by a plan's ``compute_dtype``."""


@dataclass(frozen=True, kw_only=True)
class PlacedModel:
    """A model sharded by a plan, with memory allocated. Its weights are uninitialized until a method sets them."""

    model: Transformer
    parts: Mapping[str, Part]
    """This rank's part of each parameter; every rank holds all buffers whole."""
    coordinates: Coordinates
    """This rank's coordinates in the plan's mesh."""

    def initialize(self, seed: int) -> None:
        """Set random weights, which do not depend on the plan (on one kind of device)."""
        self._draw(seed, lambda name: True)
        for buffer in self.model.buffers():
            buffer.zero_()

    def initialize_adapters(self, seed: int) -> None:
        """Set random weights of the adapters only, as :meth:`initialize` does."""
        self._draw(seed, is_adapter)

    def import_adapters(self, factors: Mapping[str, torch.Tensor]) -> None:
        """Set the adapters to ``factors``, unsharded tensors by parameter name."""
        for name, parameter in self.model.named_parameters():
            if is_adapter(name):
                local_tensor(parameter).copy_(factors[name][self.parts[name].index])

    def _draw(self, seed: int, chosen: Callable[[str], bool]) -> None:
        std = self.model.config.initializer_std
        for position, (name, parameter) in enumerate(in_drawing_order(self.model)):
            if chosen(name):
                part = self.parts[name]
                initialize_part(local_tensor(parameter), name, position, part.shape, part.index, std, seed)

    def import_weights(self, folder: Path, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Load all weights but the adapters from a Hugging Face folder; each rank reads its part.

        Raises CheckpointError.
        """
        tensors = {name: local_tensor(weight) for name, weight in named_weights(self.model).items()}
        index = {name: whole_box(tensor.shape) for name, tensor in tensors.items()}
        index |= {name: part.index for name, part in self.parts.items()}
        import_checkpoint(folder, self.model.config, tensors, parts=index, on_progress=on_progress)


def place_model(config: ModelConfig, plan: ParallelPlan, ranks: Ranks, device: torch.device) -> PlacedModel:
    """Build the model and shard it over ``ranks`` before allocation, so that no rank ever holds more than its parts.

    A collective. Raises ConfigError if the plan does not fit the model or the number of ranks.
    """
    plan.check_model(config)
    meshes = build_meshes(plan, ranks, device.type)
    model = build_on_meta(config, COMPUTE_DTYPES[plan.compute_dtype])
    apply_plan(model, plan, meshes)
    model.to_empty(device=device)
    coordinates = Coordinates(mesh=plan.mesh, rank=ranks.rank)
    return PlacedModel(model=model, parts=find_parts(model, meshes), coordinates=coordinates)
