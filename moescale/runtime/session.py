"""Builds the model on the meta device, shards it by the plan, allocates it, and loads or initializes weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moescale.boxes import Box, num_elements, whole_box
from moescale.config import ModelConfig
from moescale.convert.checkpoint_import import import_checkpoint
from moescale.convert.folder_weights import FolderWeights
from moescale.coordinates import Coordinates
from moescale.models.fp8_gemms import use_fp8
from moescale.models.frozen_fp8 import quantize_into, weights_in_fp8
from moescale.models.lora import is_adapter
from moescale.models.transformer import PlacedPart, Transformer, build_on_meta, draw, named_weights
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
    quantized: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of the weights in fp8 on this rank that were set last, by kind: [2] fp64, see :func:`quantize_into`."""

    def initialize(self, seed: int) -> None:
        """Set random weights, which do not depend on the plan (on one kind of device)."""
        self.quantized.clear()
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
        for name, squares in draw(self.model, seed, self._place, chosen).items():
            self._note(name, squares)

    def import_weights(self, folder: Path, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Load all weights but the adapters from a Hugging Face folder; each rank reads its part.

        Raises CheckpointError.
        """
        self.quantized.clear()
        tensors = {name: local_tensor(weight) for name, weight in named_weights(self.model).items()}
        index = {name: whole_box(tensor.shape) for name, tensor in tensors.items()}
        index |= {name: part.index for name, part in self.parts.items()}
        in_fp8 = weights_in_fp8(self.model)
        import_checkpoint(
            folder, self.model.config, tensors, parts=index, leave_out=in_fp8.keys(), on_progress=on_progress
        )
        if not in_fp8:
            return
        source = FolderWeights(folder, self.model.config, self.model.embedding.weight.dtype)
        total = sum(num_elements(index[name]) for name in in_fp8)
        done = 0
        for name, of_scales in in_fp8.items():

            def read(box: Box, name: str = name) -> torch.Tensor:
                nonlocal done
                weight = source.read_box(name, box)
                done += weight.numel()
                if on_progress is not None:
                    on_progress(min(done, total), total)
                return weight

            codes, scales = (self._place(key, self.model.get_parameter(key)) for key in (name, of_scales))
            squares = quantize_into(codes.tensor, codes.box, scales.tensor, scales.box, codes.shape, read)
            self._note(name, squares)

    def _place(self, name: str, parameter: torch.nn.Parameter) -> PlacedPart:
        """This rank's part of a parameter."""
        part = self.parts[name]
        return PlacedPart(local_tensor(parameter), part.index, part.shape)

    def _note(self, name: str, squares: torch.Tensor) -> None:
        """Add to what is known of the weights of this one's kind: the same module in any layer."""
        kind = name.split(".", 2)[2].removesuffix(".weight")
        self.quantized[kind] = self.quantized.get(kind, 0) + squares

    def errors_in_fp8(self, ranks: Ranks) -> dict[str, float]:
        """By kind the Frobenius norm of what weights in fp8 are off by, over that of the weights. A collective."""
        if not self.quantized:
            return {}
        sums = ranks.sum(torch.stack(list(self.quantized.values()))).sqrt().tolist()
        return {kind: off / max(norm, 1e-300) for kind, (off, norm) in zip(self.quantized, sums, strict=True)}


def place_model(config: ModelConfig, plan: ParallelPlan, ranks: Ranks, device: torch.device) -> PlacedModel:
    """Build the model and shard it over ``ranks`` before allocation, so that no rank ever holds more than its parts.

    A collective. Raises ConfigError if the plan does not fit the model or the number of ranks.
    """
    plan.check_model(config)
    meshes = build_meshes(plan, ranks, device.type)
    model = build_on_meta(config, COMPUTE_DTYPES[plan.compute_dtype])
    apply_plan(model, plan, meshes)
    model.to_empty(device=device)
    use_fp8(model, experts=plan.expert_gemms == "fp8", dense=plan.dense_gemms == "fp8")
    coordinates = Coordinates(mesh=plan.mesh, rank=ranks.rank)
    return PlacedModel(model=model, parts=find_parts(model, meshes), coordinates=coordinates)
