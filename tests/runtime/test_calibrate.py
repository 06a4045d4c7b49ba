from __future__ import annotations

from collections.abc import Callable

import pytest

from moescale.errors import ConfigError
from moescale.planner import cluster
from moescale.runtime import calibrate
from moescale.runtime.calibrate import plausible_clock


def measured(*values: float) -> Callable[[], float]:
    remaining = iter(values)
    return lambda: next(remaining)


def test_a_measurement_that_a_neighbour_disturbed_is_repeated() -> None:
    assert plausible_clock(measured(0.85)) == 0.85
    assert plausible_clock(measured(0.33, 0.84)) == 0.84


def test_a_gpu_that_stays_busy_is_refused_with_what_was_measured() -> None:
    with pytest.raises(ConfigError, match=r"sustained_clock was measured three times as 0\.33, 0\.30, 0\.41"):
        plausible_clock(measured(0.33, 0.30, 0.41))


def test_what_is_measured_is_what_a_cluster_file_may_hold() -> None:
    assert calibrate.MIN_SUSTAINED_CLOCK == cluster.MIN_SUSTAINED_CLOCK
