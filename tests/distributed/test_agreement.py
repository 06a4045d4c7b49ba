"""What ranks must agree on: numbers reported, steps skipped, a stop asked of one, and who stands where in a mesh."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from gloo_ranks import GlooRanks
from moescale.errors import NonFiniteLossError, Preempted
from moescale.runtime.meshes import build_meshes
from moescale.runtime.ranks import current_ranks
from moescale.runtime.train import Trainer
from plans import SEQUENCES_PER_STEP, SyntheticSteps, make_plan, make_trainer
from tiny import tiny_config

STEPS = 2
FP32_ERROR = 1e-5

LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [dict(dp_shard=2), dict(dp_replicate=2), dict(dp_shard=2, ep=2)],
    4: [
        dict(dp_shard=4),
        dict(dp_replicate=2, dp_shard=2),
        dict(dp_shard=4, ep=2),
        dict(dp_replicate=2, dp_shard=2, ep=2),
        dict(dp_replicate=2, dp_shard=2, ep=2, accumulation=2),
        dict(dp_shard=4, ep=2, accumulation=2, recompute="block", reshard=False),
    ],
}


class Report(NamedTuple):
    """What one rank reports of a run."""

    losses: list[float]
    norms: list[float]
    aux_losses: list[float]
    expert_loads: list[list[list[float]]]
    tokens: list[int]
    validation_loss: float | None


class Ending(NamedTuple):
    """How a run ended on one rank."""

    step: int
    skipped: int
    losses: list[float]
    error: str
    stored: list[int]
    weights_moved: list[bool]
    """By step: whether any weight of this rank changed in it."""


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request):
    group = GlooRanks(request.param)
    yield group
    group.close()


def report(fields: dict[str, Any]) -> Report:
    one = make_trainer(Path("unused"), total_steps=STEPS, settings={"gradient_clip": 0.1}, **fields)
    steps = iter(one.source)
    metrics = [one.train_step(next(steps)) for _ in range(STEPS)]
    plan = make_plan(tiny_config(), **fields)
    # A stream of its own: validation must not move the training's.
    one.validation = lambda: next(iter(SyntheticSteps(plan, tiny_config().vocab_size)))
    one._validate()
    return Report(
        losses=[step.loss for step in metrics],
        norms=[step.gradient_norm for step in metrics],
        aux_losses=[step.aux_loss for step in metrics],
        expert_loads=[step.expert_load for step in metrics],
        tokens=[step.tokens for step in metrics],
        validation_loss=one._validation_loss,
    )


def test_every_rank_reports_the_numbers_of_one_device(ranks):
    """With every step clipped, so that a norm that counts a replica twice, or a shard never, shows in the losses too.

    AdamW hardly notices a factor that stays the same: the norms themselves must be compared.
    """
    alone = report({})
    assert min(alone.norms) > 0.1
    for fields in LAYOUTS[ranks.size]:
        # The auxiliary loss is a mean over sequences, and micro-batches are equally many: any cut has the same mean.
        for actual in ranks.run(report, fields):
            for name in ("losses", "norms", "aux_losses"):
                expected = pytest.approx(getattr(alone, name), rel=FP32_ERROR)
                assert getattr(actual, name) == expected, f"{name} on {fields}"
            assert actual.expert_loads == alone.expert_loads, fields
            assert actual.tokens == alone.tokens, fields
            assert actual.validation_loss == pytest.approx(alone.validation_loss, rel=FP32_ERROR), fields


def poison(trainer: Trainer, rank: int, step: int) -> None:
    """Make one element of a gradient NaN, on one rank and in one step only."""
    if current_ranks().rank != rank:
        return
    run = trainer.micro_batches.run
    # A parameter this rank speaks for: replicas leave the norm to the first of them.
    name = next(name for name, part in trainer.optimizer.parts.items() if part.is_first_copy)

    def run_then_poison(*args: Any) -> None:
        run(*args)
        if trainer.step + 1 == step:
            trainer.optimizer.gradient(name).view(-1)[0] = torch.nan

    trainer.micro_batches.run = run_then_poison  # type: ignore[method-assign]


def end_of_run(folder: Path, fields: dict[str, Any], fault: str, rank: int, skip: bool) -> Ending:
    one = make_trainer(folder, total_steps=4, settings={"skip_nonfinite": skip}, **fields)
    moved = []
    weights = [weight.clone() for weight in one.optimizer.weights.values()]

    def after_step(metrics: Any) -> None:
        now = [weight.clone() for weight in one.optimizer.weights.values()]
        moved.append(any(not torch.equal(a, b) for a, b in zip(weights, now, strict=True)))
        weights[:] = now
        if fault == "stop" and metrics.step == 2 and current_ranks().rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)

    one.observer.after_step = after_step
    if fault == "nan":
        poison(one, rank, step=2)
    error = ""
    try:
        one.train()
    except (NonFiniteLossError, Preempted) as caught:
        error = f"{type(caught).__name__}: {caught}"
    stored = [checkpoint.step for checkpoint in one.store.list()]
    return Ending(one.step, one.nonfinite.skipped_steps, one.observer.losses, error, stored, moved)


@pytest.mark.parametrize("culprit", ["first", "last"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(tmp_path, ranks, culprit):
    rank = 0 if culprit == "first" else ranks.size - 1
    endings = ranks.run(end_of_run, tmp_path, dict(dp_shard=ranks.size, ep=2), "nan", rank, True)
    for ending in endings:
        assert (ending.step, ending.skipped, ending.error) == (4, 1, "")
        assert ending.weights_moved == [True, False, True, True]
        assert ending.losses == endings[0].losses
        assert torch.tensor(ending.losses).isfinite().all()


def test_a_step_that_is_not_finite_on_one_rank_stops_all_and_names_the_sequences_of_all(tmp_path, ranks):
    for ending in ranks.run(end_of_run, tmp_path, dict(dp_shard=ranks.size), "nan", 1, False):
        sequences = ", ".join(str(number) for number in range(SEQUENCES_PER_STEP, 2 * SEQUENCES_PER_STEP))
        assert ending.error.startswith("NonFiniteLossError: step 2: ")
        assert f"the step's sequences are {sequences}." in ending.error
        assert ending.stored == []


def test_a_stop_asked_of_one_rank_stops_all_after_the_same_step_with_one_checkpoint(tmp_path, ranks):
    for ending in ranks.run(end_of_run, tmp_path, dict(dp_shard=ranks.size), "stop", ranks.size - 1, False):
        assert ending.step == 2
        assert ending.error.startswith("Preempted: stopped by SIGTERM after step 2 of 4")
        assert ending.stored == [2]


def places(axes: dict[str, int]) -> tuple[list[int], list[int]]:
    meshes = build_meshes(make_plan(tiny_config(), **axes), current_ranks(), "cpu")
    assert meshes is not None
    assert meshes.dense.mesh_dim_names == ("dp_replicate", "dp_shard")
    assert meshes.experts.mesh_dim_names == ("dp_replicate", "edp", "ep")
    return meshes.dense.get_coordinate(), meshes.experts.get_coordinate()


def test_neighbouring_ranks_share_a_scale_unit_and_within_it_the_experts():
    group = GlooRanks(4)
    try:
        assert group.run(places, dict(dp_replicate=2, dp_shard=2, ep=2)) == [
            ((0, 0), (0, 0, 0)),
            ((0, 1), (0, 0, 1)),
            ((1, 0), (1, 0, 0)),
            ((1, 1), (1, 0, 1)),
        ]
        assert group.run(places, dict(dp_shard=4, ep=2)) == [
            ((0, 0), (0, 0, 0)),
            ((0, 1), (0, 0, 1)),
            ((0, 2), (0, 1, 0)),
            ((0, 3), (0, 1, 1)),
        ]
    finally:
        group.close()
