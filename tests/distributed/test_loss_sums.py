"""What several ranks compute of the same tokens counts once: the sums of a step with ranks along another axis."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from gloo_ranks import GlooRanks
from moescale.coordinates import ONE_DEVICE, Coordinates
from moescale.models.transformer import build_on_meta, initialize
from moescale.plan import MeshShape
from moescale.report.metrics import StepMetrics
from moescale.runtime.checkpoint import StoredTensors
from moescale.runtime.checkpoint_store import CheckpointStore
from moescale.runtime.layout import whole
from moescale.runtime.ranks import current_ranks
from moescale.runtime.settings import TrainSettings
from moescale.runtime.train import Trainer
from plans import Recorder, SyntheticSteps, make_plan
from tiny import tiny_v3_config


class Outcome(NamedTuple):
    metrics: list[StepMetrics]
    validation_loss: float
    stored: dict[str, torch.Tensor]


def train(folder: Path, mesh: MeshShape | None) -> Outcome:
    """Three steps and a validation of ranks that all hold the whole model, and differ along axes of ``mesh``."""
    ranks = current_ranks()
    place = ONE_DEVICE if mesh is None else Coordinates(mesh=mesh, rank=ranks.rank)
    config = tiny_v3_config()
    model = build_on_meta(config, torch.float32).to_empty(device="cpu")
    initialize(model, seed=0)
    plan = make_plan(config)
    source = SyntheticSteps(plan, config.vocab_size, place=place)
    held_out = next(iter(SyntheticSteps(plan, config.vocab_size, place=place)))
    parts = {
        name: replace(whole(parameter.shape), is_first_copy=place.writes_stage)
        for name, parameter in model.named_parameters()
    }
    one = Trainer(
        model=model,
        settings=TrainSettings(learning_rate=3e-3),
        total_steps=3,
        source=source,
        store=CheckpointStore(folder, keep=1),
        observer=Recorder(),
        validation=lambda: held_out,
        ranks=ranks,
        coordinates=place,
        parts=parts,
    )
    summary = one.train()
    with StoredTensors(one.store.last()) as stored:
        tensors = {
            name: stored.read(name, tuple(slice(0, size) for size in shape)) for name, shape in stored.shapes.items()
        }
    assert summary.validation_loss is not None
    return Outcome(one.observer.metrics, summary.validation_loss, tensors)


def comparable(metrics: StepMetrics) -> dict[str, Any]:
    return {name: value for name, value in vars(metrics).items() if not name.endswith("_seconds")}


@pytest.fixture(scope="module")
def two_ranks():
    group = GlooRanks(2)
    yield group
    group.close()


def test_ranks_with_the_same_tokens_count_once_and_write_once(tmp_path, two_ranks):
    alone = train(tmp_path / "alone", None)
    for together in two_ranks.run(train, tmp_path / "together", MeshShape(tp=2)):
        assert list(map(comparable, together.metrics)) == list(map(comparable, alone.metrics))
        assert together.validation_loss == alone.validation_loss
        assert together.stored.keys() == alone.stored.keys()
        for name, tensor in alone.stored.items():
            torch.testing.assert_close(together.stored[name], tensor, rtol=0, atol=0)
