"""Reads the weights of a Hugging Face folder parameter by parameter, in the model's layout."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch

from moescale.boxes import Box, whole_box
from moescale.config import ModelConfig
from moescale.convert.stored_layout import copies_of, fill, read_layout
from moescale.convert.weight_files import read_parts
from moescale.models.transformer import build_on_meta, named_weights


class FolderWeights:
    """The weights of a folder as a :class:`~moescale.convert.tensor_source.TensorSource`, with a model's dtypes.

    Raises CheckpointError if the folder does not contain the model of ``config``.
    """

    def __init__(self, folder: Path, config: ModelConfig, dtype: torch.dtype) -> None:
        self._table, self._stored = read_layout(folder, config)
        self._weights = named_weights(build_on_meta(config, dtype))

    def names(self) -> Iterable[str]:
        return self._table.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._weights[name].shape)

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """Return the parameter on the CPU, or with ``index`` its slice of dim 0."""
        box = whole_box(self.shape(name))
        if index is not None:
            box = (slice(index, index + 1), *box[1:])
        weight = self.read_box(name, box)
        return weight if index is None else weight[0]

    def read_box(self, name: str, box: Box) -> torch.Tensor:
        """A box of the parameter, on the CPU."""
        weight = torch.empty([part.stop - part.start for part in box], dtype=self._weights[name].dtype)
        copied = 0
        for piece in self._table[name]:
            for copy in copies_of(piece, box, weight):
                (part,) = read_parts(self._stored[piece.key].file, [(copy.key, copy.source)])
                fill(copy, part, self._stored)
                copied += copy.target.numel()
        assert copied == math.prod(weight.shape), name
        return weight
