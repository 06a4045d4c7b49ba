"""Kernels run on the GPU where there is one, else in Triton's interpreter; their outputs start as NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every ``torch.empty`` of floats is full of NaN, so that an element no kernel writes is seen."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        out = empty(*args, **kwargs)  # type: ignore[call-overload]
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(-(2**31) + 1)

    monkeypatch.setattr(torch, "empty", poisoned)
    yield
