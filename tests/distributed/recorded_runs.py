"""Runs of the tiny model with what a comparison needs, and how alike a run on many ranks must be to one device's.

In fp32, the same within 1e-5. In bf16, losses differ from one device's by at most twice what another cut into
micro-batches changes there; and gradients are compared with fp32 arithmetic on the same weights, of which they may be
off by twice as much as one device's are. (Where rows travel, other intermediate values are rounded, as well as before:
a run of experts on several ranks differs from one device's more than two cuts do, yet is no further from fp32.)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from plans import make_trainer

FP32_ERROR = 1e-5


class Run(NamedTuple):
    losses: list[float]
    norms: list[float]
    gradients: dict[str, tuple[tuple[slice, ...], torch.Tensor]]
    """Of the first step: this rank's part in fp32, and its place in the whole."""


def record_run(steps: int, fields: dict[str, Any]) -> Run:
    """Train for ``steps`` with :func:`plans.make_trainer`'s ``fields``; nothing is saved."""
    settings = {"final_checkpoint": False, **fields.get("settings", {})}
    one = make_trainer(Path("unused"), total_steps=steps, **fields | {"settings": settings})
    gradients: dict[str, tuple[tuple[slice, ...], torch.Tensor]] = {}
    update = one.optimizer.step

    def record_then_update(learning_rate: float, norm: torch.Tensor) -> None:
        if not gradients:
            for name, part in one.optimizer.parts.items():
                gradients[name] = part.index, one.optimizer.gradient(name).float().clone()
        update(learning_rate, norm)

    one.optimizer.step = record_then_update  # type: ignore[method-assign]
    one.train()
    return Run(one.observer.losses, [metrics.gradient_norm for metrics in one.observer.metrics], gradients)


def assert_same_run(runs: Sequence[Run], alone: Run, loss_tolerance: float = FP32_ERROR) -> None:
    """``loss_tolerance`` is of the steps after the first one."""
    _assert_ranks_agree(runs, alone)
    losses, norms = runs[0].losses, runs[0].norms
    assert losses[0] == pytest.approx(alone.losses[0], rel=FP32_ERROR), "the first loss"
    assert norms[0] == pytest.approx(alone.norms[0], rel=FP32_ERROR), "the first gradient norm"
    assert losses == pytest.approx(alone.losses, rel=loss_tolerance), "the losses"
    for name, error in _gradient_errors(runs, alone).items():
        assert error <= FP32_ERROR, f"the first gradient of {name} is off by {error:.1e}"


def assert_as_near_to_fp32(runs: Sequence[Run], alone: Sequence[Run], exact: Run) -> None:
    """``alone``: one device with several cuts into micro-batches; ``exact``: the first step in fp32 arithmetic."""
    _assert_ranks_agree(runs, alone[0])
    difference, tolerance = loss_difference(runs[0], alone[0]), 2 * loss_noise(alone)
    assert difference <= tolerance, f"the losses differ by {difference:.1e}, of which {tolerance:.1e} is rounding"
    one_device = [_gradient_errors([run], exact) for run in alone]
    for name, error in _gradient_errors(runs, exact).items():
        allowed = 2 * max(errors[name] for errors in one_device)
        assert error <= allowed, f"the first gradient of {name} is off by {error:.1e}, of which {allowed:.1e} is bf16"


def loss_difference(a: Run, b: Run) -> float:
    """The largest relative one of all steps."""
    return max(abs(x - y) / abs(y) for x, y in zip(a.losses, b.losses, strict=True))


def loss_noise(runs: Sequence[Run]) -> float:
    """The largest difference of any two of the same training's ``runs``."""
    return max(loss_difference(a, b) for a, b in combinations(runs, 2))


def _assert_ranks_agree(runs: Sequence[Run], alone: Run) -> None:
    for run in runs:
        assert run.losses == runs[0].losses and run.norms == runs[0].norms, "ranks disagree"
    # Whatever the gradients are, the norm is theirs: each element counted once, whoever holds it or a copy of it.
    squares = sum(gradient.double().square().sum() for gradient in _put_together(runs, alone).values())
    assert runs[0].norms[0] == pytest.approx(squares.sqrt().item(), rel=FP32_ERROR), "the norm is not the gradients'"


def _gradient_errors(runs: Sequence[Run], reference: Run) -> dict[str, float]:
    """By parameter: the norm of the difference, relative to that of the reference's gradient."""
    whole = _put_together(runs, reference)
    # A gradient that is next to nothing beside the others is a difference of rounded sums.
    floor = 1e-3 * max(gradient.square().mean().sqrt() for _, gradient in reference.gradients.values())
    return {
        name: float((whole[name] - gradient).norm() / gradient.norm().clamp(min=float(floor) * gradient.numel() ** 0.5))
        for name, (_, gradient) in reference.gradients.items()
    }


def _put_together(runs: Sequence[Run], reference: Run) -> dict[str, torch.Tensor]:
    """First-step gradients of the ranks as wholes. Ranks that hold the same part must agree on it."""
    whole = {name: torch.full_like(gradient, torch.nan) for name, (_, gradient) in reference.gradients.items()}
    for run in runs:
        for name, (index, gradient) in run.gradients.items():
            known = whole[name][index]
            assert (known.isnan() | (known == gradient)).all(), f"ranks disagree on the gradient of {name}{index}"
            whole[name][index] = gradient
    for name, gradient in whole.items():
        assert not gradient.isnan().any(), f"no rank holds some of {name}, or its gradient is NaN"
    return whole
