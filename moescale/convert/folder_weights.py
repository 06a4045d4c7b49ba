"""The weights of a Hugging Face folder, read parameter by parameter as a model holds them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch

from moescale.boxes import whole_box
from moescale.config import ModelConfig
from moescale.convert.checkpoint import _as_stored, _check_stored, _copies_of, _tied_keys, _values
from moescale.convert.key_table import build_key_table
from moescale.convert.weight_files import read_headers, read_parts
from moescale.errors import NonFiniteWeightsError
from moescale.models.registry import family_of
from moescale.models.transformer import build_on_meta, named_weights


class FolderWeights:
    """A source of weights for an export, in the dtype of a model in ``dtype``.

    Raises CheckpointError where the folder does not hold what ``config`` describes.
    """

    def __init__(self, folder: Path, config: ModelConfig, dtype: torch.dtype) -> None:
        may_be_absent = _tied_keys(family_of(config).names) if config.tie_embeddings else ()
        self._stored = read_headers(folder, may_be_absent=may_be_absent)
        self._table = _as_stored(build_key_table(config), config, self._stored)
        _check_stored(folder, config, self._table, self._stored)
        self._weights = named_weights(build_on_meta(config, dtype))

    def names(self) -> Iterable[str]:
        return self._table.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._weights[name].shape)

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """The parameter on the CPU, or with ``index`` its slice of dim 0."""
        box = whole_box(self.shape(name))
        if index is not None:
            box = (slice(index, index + 1), *box[1:])
        weight = torch.empty([part.stop - part.start for part in box], dtype=self._weights[name].dtype)
        copied = 0
        for piece in self._table[name]:
            for copy in _copies_of(piece, box, weight):
                (part,) = read_parts(self._stored[piece.key].file, [(copy.key, copy.source)])
                copy.target.copy_(_values(copy, part, self._stored).view(copy.target.shape))
                if not torch.isfinite(copy.target).all():
                    raise NonFiniteWeightsError(
                        f"{self._stored[piece.key].file}: tensor '{copy.key}' has values that are not finite, or not "
                        f"in {weight.dtype}; fetch the folder again, or ask who made it"
                    )
                copied += copy.target.numel()
        assert copied == math.prod(weight.shape), name
        return weight if index is None else weight[0]
