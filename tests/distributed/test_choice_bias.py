"""The biases of DeepSeek-V3's choice follow the load of the whole step: over ranks, micro-batches and resumptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from gloo_ranks import GlooRanks
from moescale.models.blocks.moe import Router
from moescale.runtime.checkpoint_weights import CheckpointWeights
from moescale.runtime.train import Trainer
from plans import make_trainer
from recorded_runs import assert_same_run, record_run
from tiny import tiny_config, tiny_glm_config, tiny_v3_config

RATE = 0.02
MODEL = dict(num_groups=4, top_k_groups=2, initializer_std=0.2)


class Outcome(NamedTuple):
    biases: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    """This rank's parts of the master weights."""
    losses: list[float]


def trainer(folder: Path, rate: float = RATE, **fields: Any) -> Trainer:
    settings = dict(router_bias_update_rate=rate, weight_decay=0.5) | fields.pop("settings", {})
    return make_trainer(folder, model=MODEL, build_config=tiny_v3_config, settings=settings, **fields)


def train(folder: Path, until: int, fields: dict[str, Any]) -> Outcome:
    """Continue the run in ``folder``, or begin one, up to a step, and save there."""
    one = trainer(folder, **fields)
    checkpoint = one.store.last()
    if checkpoint is not None:
        one.resume(checkpoint)
    steps = iter(one.source)
    while one.step < until:
        one.observer.on_step(one.train_step(next(steps)))
    one._save()
    one._commit()
    weights = {name: one.optimizer.master(name).clone() for name in one.optimizer.parameters}
    return Outcome({name: buffer.clone() for name, buffer in one.buffers.items()}, weights, one.observer.losses)


@pytest.fixture(scope="module")
def two_ranks():
    group = GlooRanks(2)
    yield group
    group.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(tmp_path_factory.mktemp("alone"), 4, {})


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_moves_each_bias_towards_the_mean_load_of_tokens_that_are_trained_on(tmp_path, accumulation):
    one = trainer(tmp_path, accumulation=accumulation)
    chosen: dict[str, list[torch.Tensor]] = {name: [] for name in one.buffers}
    for name, module in one.model.named_modules():
        if isinstance(module, Router):
            module.register_forward_hook(
                lambda module, args, routing, name=name: chosen[f"{name}.choice_bias"].append(routing.topk_ids)
            )
    (batches,) = [batches for _, batches in zip(range(1), one.source, strict=False)]
    one.train_step(batches)
    assert len(chosen) == 2
    moved = set()
    for name, bias in one.buffers.items():
        load = [0] * 16
        for batch, ids in zip(batches, chosen[name], strict=True):
            for target, experts in zip(batch.targets.flatten().tolist(), ids.tolist(), strict=True):
                for expert in experts if target >= 0 else ():
                    load[expert] += 1
        mean = sum(load) / 16
        assert sum(load) == 3 * sum(int((batch.targets >= 0).sum()) for batch in batches)
        wanted = [RATE * ((count < mean) - (count > mean)) for count in load]
        assert bias.tolist() == pytest.approx(wanted, abs=1e-9)
        moved |= set(bias.sign().tolist())
    assert moved >= {-1.0, 1.0}


MESHES = [
    dict(dp_shard=2),
    dict(dp_shard=2, ep=2),
    dict(dp_replicate=2, accumulation=2),
    dict(dp_shard=2, ep=2, dense_sharding="fsdp"),
]


@pytest.mark.parametrize("mesh", MESHES)
def test_every_layout_moves_the_biases_as_one_device_does(tmp_path, two_ranks, alone, mesh):
    for outcome in two_ranks.run(train, tmp_path, 4, mesh):
        assert outcome.losses == pytest.approx(alone.losses, rel=1e-5)
        assert outcome.biases.keys() == alone.biases.keys()
        for name, bias in outcome.biases.items():
            assert torch.equal(bias, alone.biases[name]), name


@pytest.mark.parametrize("build_config", [tiny_v3_config, tiny_glm_config])
def test_ranks_with_a_share_of_the_experts_train_as_one_device_does(two_ranks, build_config):
    """Losses, and every gradient of the first step."""
    fields = dict(model=MODEL, build_config=build_config)
    alone = record_run(4, fields)
    for layout in (dict(ep=2), dict(ep=2, recompute="block", dense_sharding="fsdp")):
        assert_same_run(two_ranks.run(record_run, 4, fields | dict(dp_shard=2) | layout), alone)


def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(tmp_path, alone):
    train(tmp_path, 2, {})
    resumed = train(tmp_path, 4, {})
    for before, after in ((alone.biases, resumed.biases), (alone.weights, resumed.weights)):
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_biases_are_saved_once_and_read_by_every_rank_of_another_layout(tmp_path, two_ranks, alone):
    train(tmp_path, 2, {})
    two_ranks.run(train, tmp_path, 3, dict(dp_shard=2, ep=2))
    resumed = train(tmp_path, 4, {})
    for name, bias in resumed.biases.items():
        assert torch.equal(bias, alone.biases[name])
    checkpoint = trainer(tmp_path).store.last()
    assert checkpoint is not None
    with CheckpointWeights(checkpoint) as source:
        for name, bias in resumed.biases.items():
            assert torch.equal(source.read(name), bias)


def test_a_rate_of_0_and_a_skipped_step_leave_biases_alone(tmp_path):
    one = trainer(tmp_path / "still", rate=0.0)
    one.train_step(next(iter(one.source)))
    assert not any(bias.any() for bias in one.buffers.values())
    one = trainer(tmp_path / "skipped", settings=dict(skip_nonfinite=True))
    with torch.no_grad():
        one.model.norm.weight.fill_(torch.nan)
    assert one.train_step(next(iter(one.source))).skipped
    assert not any(bias.any() for bias in one.buffers.values())


def test_the_loss_alone_decides_gradients_and_weights_where_biases_are_equal(tmp_path):
    """No gradient, weight decay or master weight of a bias: the optimizer does not know it."""
    one = trainer(tmp_path)
    assert one.buffers and not one.buffers.keys() & one.optimizer.parameters.keys()
    assert not any(bias.requires_grad for bias in one.buffers.values())


def train_padded(folder: Path, fields: dict[str, Any]) -> tuple[list[float], list[list[list[float]]]]:
    """Auxiliary losses and experts' load of three steps on padded sequences."""
    one = make_trainer(folder, total_steps=3, with_padding=True, settings=dict(final_checkpoint=False), **fields)
    one.train()
    return [step.aux_loss for step in one.observer.metrics], [step.expert_load for step in one.observer.metrics]


@pytest.mark.parametrize("build_config", [tiny_config, tiny_v3_config])
def test_ranks_leave_padding_out_of_loss_and_load_as_one_device_does(tmp_path, two_ranks, build_config):
    fields = dict(build_config=build_config, model=dict(initializer_std=0.2, aux_loss_alpha=0.3))
    aux_losses, loads = train_padded(tmp_path, fields)
    for layout in (dict(dp_shard=2, accumulation=2), dict(dp_shard=2, ep=2)):
        for found_losses, found_loads in two_ranks.run(train_padded, tmp_path, fields | layout):
            assert found_losses == pytest.approx(aux_losses, rel=1e-5)
            for found, load in zip(found_loads, loads, strict=True):
                torch.testing.assert_close(torch.tensor(found), torch.tensor(load))


@pytest.mark.parametrize("build_config", [tiny_config, tiny_v3_config])
def test_what_padding_holds_changes_no_bias_no_weight_and_no_load(tmp_path, build_config):
    found = []
    for shift in (0, 1):
        one = make_trainer(tmp_path, build_config=build_config, with_padding=True, model=dict(aux_loss_alpha=0.3))
        batches = next(iter(one.source))
        for batch in batches:
            assert batch.padding.any()
            batch.tokens[batch.padding] = (batch.tokens[batch.padding] + shift) % 96
        metrics = one.train_step(batches)
        found.append((metrics.aux_loss, metrics.expert_load, one.model.state_dict()))
    (aux_loss, load, weights), (other_loss, other_load, others) = found
    assert aux_loss == pytest.approx(other_loss, rel=1e-6) and load == other_load
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-5, atol=1e-6, msg=name)
