"""Any plan trains as one device does: every gradient of the first step, and the losses of 20 steps."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from gloo_ranks import GlooRanks
from plans import make_trainer

FP32_ERROR = 1e-5
STEPS = 20

MESHES: dict[int, list[dict[str, Any]]] = {
    2: [dict(dp_shard=2), dict(dp_replicate=2), dict(dp_shard=2, ep=2)],
    4: [
        dict(dp_shard=4),
        dict(dp_replicate=2, dp_shard=2),
        dict(dp_shard=4, ep=4),
        dict(dp_shard=4, ep=2),
        dict(dp_replicate=2, dp_shard=2, ep=2),
    ],
    8: [dict(dp_shard=8, ep=4), dict(dp_replicate=2, dp_shard=4, ep=2)],
}
RECOMPUTES: list[dict[str, Any]] = [
    dict(recompute=recompute, reshard=reshard, dp_shard=2, **mesh)
    for recompute in ("block", ("experts",))
    for reshard in (True, False)
    for mesh in ({}, {"ep": 2})
]


class Run(NamedTuple):
    losses: list[float]
    norms: list[float]
    gradients: dict[str, tuple[tuple[slice, ...], torch.Tensor]]
    """Of the first step: this rank's part and its place in the whole."""


def train(steps: int, fields: dict[str, Any]) -> Run:
    one = make_trainer(Path("unused"), total_steps=steps, **fields)
    gradients = {}
    update = one.optimizer.step

    def record(*args):
        if not gradients:
            for name, part in one.optimizer.parts.items():
                gradients[name] = (part.index, one.optimizer.gradient(name).clone())
        update(*args)

    one.optimizer.step = record
    one._save = lambda: None
    one.train()
    norms = [metrics.gradient_norm for metrics in one.observer.metrics]
    return Run(one.observer.losses, norms, gradients)


@cache
def on_one_device(steps: int, **fields: Any) -> Run:
    return train(steps, fields)


@pytest.fixture(scope="module", params=[2, 4, 8])
def ranks(request):
    group = GlooRanks(request.param)
    yield group
    group.close()


def assert_same_run(runs: list[Run], alone: Run, tolerance: float) -> None:
    for run in runs:
        assert run.losses == runs[0].losses and run.norms == runs[0].norms, "ranks disagree"
        assert run.losses == pytest.approx(alone.losses, rel=tolerance)
        # A gradient that is next to nothing beside the others is a difference of rounded sums.
        floor = 1e-3 * max(gradient.abs().max() for _, gradient in alone.gradients.values())
        for name, (index, gradient) in run.gradients.items():
            expected = alone.gradients[name][1]
            scale = expected.abs().max().clamp(min=floor)
            error = (gradient - expected[index]).abs().max() / scale if gradient.numel() else 0.0
            assert error <= tolerance, f"the gradient of {name}{index} is off by {error:.1e}"
    for name in alone.gradients:
        covered = torch.zeros_like(alone.gradients[name][1])
        for run in runs:
            covered[run.gradients[name][0]] += 1
        assert (covered > 0).all(), f"no rank holds some of {name}"


@pytest.fixture(scope="module")
def two_ranks():
    group = GlooRanks(2)
    yield group
    group.close()


def test_every_mesh_trains_as_one_device_does(ranks):
    for mesh in MESHES[ranks.size]:
        assert_same_run(ranks.run(train, STEPS, mesh), on_one_device(STEPS), FP32_ERROR)


def test_every_recompute_mode_and_resharding_trains_as_one_device_does(two_ranks):
    for fields in RECOMPUTES:
        assert_same_run(two_ranks.run(train, 5, fields), on_one_device(5), FP32_ERROR)


def test_recomputing_on_one_device_changes_nothing():
    for recompute in ("block", ("experts",)):
        alone = on_one_device(5)
        again = train(5, dict(recompute=recompute))
        assert again.losses == alone.losses and again.norms == alone.norms


def test_accumulated_micro_batches_train_as_one(two_ranks):
    for mesh in (dict(dp_shard=2), dict(dp_replicate=2), dict(dp_shard=2, ep=2)):
        runs = two_ranks.run(train, 5, dict(accumulation=4, **mesh))
        assert_same_run(runs, on_one_device(5), FP32_ERROR)


def test_ranks_whose_experts_nobody_chose_still_train_as_one_device_does(two_ranks):
    """All tokens of a step are equal, so all go to the same two experts, which for K = 1 is one rank's."""
    fields = dict(one_token=True, model=dict(top_k=1))
    alone = train(5, fields)
    for mesh in (dict(dp_shard=2, ep=2), dict(dp_shard=2)):
        assert_same_run(two_ranks.run(train, 5, fields | mesh), alone, FP32_ERROR)


@pytest.mark.parametrize("experts", [6, 7])
def test_experts_that_do_not_divide_by_the_ranks_train_as_one_device_does(two_ranks, experts):
    """7 experts on 2 ranks are divided by rows; with an odd width they are not, and one rank holds more of them."""
    for width in (24, 25) if experts == 7 else (24,):
        fields = dict(model=dict(num_experts=experts, expert_intermediate_size=width))
        assert_same_run(two_ranks.run(train, 5, fields | dict(dp_shard=2)), train(5, fields), FP32_ERROR)


FORMATS = [
    dict(optimizer_state_dtype=moments, master_weight_format=master, gradient_dtype=gradient, compute_dtype="bf16")
    for moments, master, gradient in [
        ("fp32", "fp32", "fp32"),
        ("bf16", "bf16_remainder", "fp32"),
        ("int8", "stochastic_bf16", "bf16"),
        ("int8", "bf16_remainder", "fp32"),
    ]
]


def test_every_optimizer_format_trains_within_the_noise_of_bf16(two_ranks):
    """The yardstick: what cutting a step into micro-batches changes on one device, in the same format."""
    for format in FORMATS:
        alone = train(STEPS, format)
        noise = max(
            abs(a - b)
            for accumulation in (2, 4)
            for a, b in zip(alone.losses, train(STEPS, dict(accumulation=accumulation, **format)).losses, strict=True)
        )
        for mesh in (dict(dp_shard=2), dict(dp_shard=2, ep=2)):
            losses = two_ranks.run(train, STEPS, format | mesh)[0].losses
            difference = max(abs(a - b) for a, b in zip(losses, alone.losses, strict=True))
            assert difference <= 2 * noise, f"{format} on {mesh}: {difference:.1e}, noise {noise:.1e}"


def test_offloaded_optimizer_state_changes_nothing(two_ranks):
    mesh = dict(dp_shard=2, ep=2)
    stay, leave = (two_ranks.run(train, 5, dict(offload_optimizer=offload, **mesh)) for offload in (False, True))
    assert [run.losses for run in stay] == [run.losses for run in leave]
