"""Sources of weights for an export: the protocol, and the parameters of a model in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch


class TensorSource(Protocol):
    """A source of weights: a checkpoint of a run, a Hugging Face folder, or a model in memory."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """Return the parameter on the CPU, or with ``index`` its slice of dim 0."""
        ...


class ModelWeights:
    """The parameters of a model in memory as a :class:`TensorSource`."""

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._parameters = parameters

    def names(self) -> Iterable[str]:
        return self._parameters.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._parameters[name].shape)

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        parameter = self._parameters[name].detach()
        return (parameter if index is None else parameter[index]).cpu()
