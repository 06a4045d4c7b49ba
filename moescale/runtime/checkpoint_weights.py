"""The weights of a checkpoint without optimizer state, for export."""

from __future__ import annotations

import torch

from moescale.boxes import whole_box
from moescale.kernels.adamw import join_master
from moescale.runtime.checkpoint import Checkpoint, StoredTensors, verify

WEIGHTS_PREFIX = "weights."
REMAINDER_PREFIX = "remainder."


class CheckpointWeights:
    """A context manager that reads a checkpoint's weights tensor by tensor or slice by slice.

    It is a :class:`~moescale.convert.tensor_source.TensorSource`, with dtypes.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        verify(checkpoint)
        self._stored = StoredTensors(checkpoint)

    def __enter__(self) -> CheckpointWeights:
        return self

    def __exit__(self, *error: object) -> None:
        self._stored.__exit__(*error)

    def names(self) -> list[str]:
        return [key.removeprefix(WEIGHTS_PREFIX) for key in self._stored.shapes if key.startswith(WEIGHTS_PREFIX)]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored.shapes[WEIGHTS_PREFIX + name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of :meth:`read`: fp32 if the run kept fp32 master weights in any form, else bf16."""
        if REMAINDER_PREFIX + name in self._stored.shapes:
            return torch.float32
        return self._stored.dtype(WEIGHTS_PREFIX + name)

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """Return the tensor, or with ``index`` its slice of dim 0."""
        box = whole_box(self.shape(name))
        if index is not None:
            box = (slice(index, index + 1), *box[1:])
        weight = self._stored.read(WEIGHTS_PREFIX + name, box)
        if REMAINDER_PREFIX + name in self._stored.shapes:
            weight = join_master(weight, self._stored.read(REMAINDER_PREFIX + name, box))
        return weight if index is None else weight[0]
