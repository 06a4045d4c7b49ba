"""Merges adapters into the weights of a folder."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from moescale.config import ModelConfig
from moescale.convert.adapter_layout import adapted_modules
from moescale.convert.folder_weights import FolderWeights
from moescale.convert.tensor_source import TensorSource
from moescale.lora import LoraSettings


class MergedWeights:
    """The weights of a folder, in the dtype of the training, with adapters added in fp32.

    A source for :func:`moescale.convert.checkpoint_export.export_checkpoint`.
    """

    def __init__(self, base: FolderWeights, adapters: TensorSource, config: ModelConfig, lora: LoraSettings) -> None:
        self._base, self._adapters, self._scale = base, adapters, lora.scale
        self._added: dict[str, tuple[str, str, int]] = {}
        for module in adapted_modules(config, lora):
            names = module.factors()
            if module.num_experts:
                self._added[f"{module.name}.gate_up"] = (names[0], names[1], 1)
                self._added[f"{module.name}.down"] = (names[2], names[3], 1)
            else:
                self._added[f"{module.name}.weight"] = (names[0], names[1], len(module.keys))

    def names(self) -> Iterable[str]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """Return the parameter in fp32, or with ``index`` its slice of dim 0."""
        weight = self._base.read(name, index).float()
        if name not in self._added:
            return weight
        a_name, b_name, parts = self._added[name]
        a, b = (self._adapters.read(factor, index).float() for factor in (a_name, b_name))
        deltas = [torch.matmul(of_b, of_a) for of_a, of_b in zip(a.chunk(parts), b.chunk(parts), strict=True)]
        return weight + self._scale * (deltas[0] if parts == 1 else torch.cat(deltas))
