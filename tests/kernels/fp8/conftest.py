"""The operators in fp8 with the implementation that a test asks for."""

from __future__ import annotations

import pytest

from moescale.kernels.fp8 import linear, mlp, reference, routed, rows
from moescale.kernels.fp8 import triton as kernels


@pytest.fixture
def parts(request, monkeypatch):
    """The implementation that the operators take, whatever the device."""
    chosen = {"triton": kernels, "torch": reference}[request.param]
    for operator in (linear, mlp, routed, rows):
        monkeypatch.setattr(operator, "kernels_for", lambda tensor: chosen)
    return chosen
