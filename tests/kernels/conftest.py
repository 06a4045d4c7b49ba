"""Kernels run on the GPU where there is one, else in Triton's interpreter; their outputs start as NaN."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from played_quack import played_package

from moescale.kernels import experts


@pytest.fixture
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every ``torch.empty`` of floats is full of NaN, so that an element no kernel writes is seen."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        out = empty(*args, **kwargs)  # type: ignore[call-overload]
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(-(2**31) + 1)

    monkeypatch.setattr(torch, "empty", poisoned)
    yield


@pytest.fixture
def cute(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The experts' back end of that name, over its package as ``played_quack`` plays it."""
    for name, module in played_package().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "moescale.kernels.experts.cute", raising=False)
    monkeypatch.setattr(experts, "cute", None, raising=False)  # what the import sets goes with the fixture
    yield importlib.import_module("moescale.kernels.experts.cute")
    sys.modules.pop("moescale.kernels.experts.cute")
