"""Which implementation of the operators in fp8 a test runs with: the parameter of the fixture ``parts``."""

from __future__ import annotations

import pytest
from agreement import DEVICE

INTERPRETED = DEVICE.type != "cuda"
SLOW_TRITON = pytest.param("triton", marks=[pytest.mark.slow] if INTERPRETED else [])
EITHER = pytest.mark.parametrize("parts", ["triton", "torch"], indirect=True)
EITHER_IN_TIME = pytest.mark.parametrize("parts", [SLOW_TRITON, "torch"], indirect=True)
"""The interpreter takes a second or more for the kernels of a few rows."""
