import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moescale.errors import CheckpointError, ConfigError, NonFiniteLossError, Preempted
from moescale.models.transformer import build_on_meta, initialize
from moescale.report.observer import RunContext
from moescale.report.registry import DEFAULT_OBSERVERS, ObserverList, make_observer
from moescale.runtime.checkpoint_store import CheckpointStore
from moescale.runtime.hooks import TrainerHook
from moescale.runtime.optimizer import OptimizerFormat
from moescale.runtime.settings import TrainSettings
from moescale.runtime.train import Trainer
from tiny import tiny_config

SEQUENCE_LENGTH = 16
FORMATS = [
    (torch.float32, OptimizerFormat()),
    (torch.bfloat16, OptimizerFormat()),
    (torch.bfloat16, OptimizerFormat(moments="bf16", master="bf16_remainder")),
    (torch.bfloat16, OptimizerFormat(moments="int8", master="stochastic_bf16", gradients=torch.bfloat16)),
]


@dataclass(frozen=True)
class SyntheticBatch:
    tokens: torch.Tensor
    targets: torch.Tensor
    sequence_ids: torch.Tensor
    document_starts: torch.Tensor | None = None
    padding: torch.Tensor | None = None


class SyntheticSource:
    """Eight sequences a step, drawn from a seed and the step's number, cut into micro-batches of any size."""

    def __init__(self, micro_batch: int = 8, vocabulary: int = 96) -> None:
        self.micro_batch = micro_batch
        self.vocabulary = vocabulary
        self.position = 0

    def __iter__(self):
        while True:
            generator = torch.Generator().manual_seed(self.position)
            tokens = torch.randint(self.vocabulary, (8, SEQUENCE_LENGTH), generator=generator)
            tokens[:, 1::2] = (tokens[:, ::2] + 1) % self.vocabulary  # half of it can be learnt
            targets = torch.cat([tokens[:, 1:], torch.full((8, 1), -100)], dim=1)
            targets[3, 5:] = -100  # so that micro-batches have unequal numbers of targets
            ids = torch.arange(8) + 8 * self.position
            self.position += 1
            parts = zip(*(part.split(self.micro_batch) for part in (tokens, targets, ids)), strict=True)
            yield [SyntheticBatch(*part) for part in parts]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


@dataclass
class Recorder:
    losses: list[float] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    saves: list[int] = field(default_factory=list)
    after_step: Any = None

    def on_resume(self, step, path):
        pass

    def on_step(self, metrics):
        self.losses.append(metrics.loss)
        self.last = metrics
        if self.after_step:
            self.after_step(metrics)

    def on_validation(self, step, loss):
        self.validations.append((step, loss))

    def on_checkpoint(self, step, path, seconds):
        self.saves.append(step)


def trainer(
    folder: Path,
    *,
    total_steps=12,
    dtype=torch.float32,
    source=None,
    validation=None,
    hooks=(),
    format=OptimizerFormat(),  # noqa: B008 - frozen
    config=None,
    prepare=lambda model: None,
    **settings,
) -> Trainer:
    fields = {"learning_rate": 1e-2, "warmup_steps": 2} | settings
    config = config or tiny_config()
    model = build_on_meta(config, dtype).to_empty(device="cpu")
    prepare(model)
    initialize(model, seed=0)
    return Trainer(
        model=model,
        settings=TrainSettings(**fields),
        total_steps=total_steps,
        source=source or SyntheticSource(),
        store=CheckpointStore(folder, keep=2),
        observer=Recorder(),
        optimizer_format=format,
        validation=validation,
        hooks=hooks,
        identity={"model": config.fingerprint()},
    )


def weights(one: Trainer) -> dict[str, torch.Tensor]:
    return {name: one.optimizer.master(name).clone() for name in one.optimizer.parameters}


@pytest.mark.parametrize(("dtype", "format"), FORMATS)
def test_the_loss_falls(tmp_path, dtype, format):
    one = trainer(tmp_path, total_steps=25, dtype=dtype, format=format)
    one.train()
    assert sum(one.observer.losses[-3:]) / 3 < one.observer.losses[0] - 0.5


def test_the_way_a_step_is_cut_into_micro_batches_does_not_change_the_losses(tmp_path):
    losses = []
    for micro_batch in (8, 4, 2):
        one = trainer(tmp_path / str(micro_batch), total_steps=6, source=SyntheticSource(micro_batch))
        one.train()
        losses.append(one.observer.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_the_step_loss_is_the_sum_over_targets_by_their_number(tmp_path):
    one = trainer(tmp_path, total_steps=1)
    batch = next(iter(SyntheticSource()))[0]
    with torch.no_grad():
        logits = one.model(batch.tokens).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
    one.train()
    assert one.observer.losses[0] == pytest.approx(expected.item(), rel=1e-5)


def test_the_auxiliary_loss_reaches_the_gradient_with_exactly_its_weight(tmp_path):
    """The router's gradient of a step is that of token loss plus alpha times the definition, for any accumulation."""
    gradients = []
    for micro_batch in (8, 2):
        one = trainer(tmp_path / str(micro_batch), gradient_clip=0.0)
        batches = next(iter(SyntheticSource(micro_batch)))
        one.optimizer.step = lambda *_: None
        one.train_step(batches)
        gradients.append(one.optimizer.gradient("layers.1.feed_forward.router.weight").clone())
    reference = trainer(tmp_path / "reference")
    batch = next(iter(SyntheticSource()))[0]
    output = reference.model(batch.tokens, targets=batch.targets)
    loss = output.loss_sum / int((batch.targets >= 0).sum()) + reference.model.config.aux_loss_alpha * output.aux_loss
    loss.backward()
    expected = reference.optimizer.gradient("layers.1.feed_forward.router.weight")
    for gradient in gradients:
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("dtype", "format"), FORMATS)
def test_a_run_resumed_from_a_checkpoint_continues_bit_for_bit(tmp_path, dtype, format):
    straight = trainer(tmp_path / "straight", total_steps=7, dtype=dtype, format=format)
    straight.train()
    first = trainer(tmp_path / "cut", total_steps=7, dtype=dtype, format=format, checkpoint_every=3)
    first.observer.after_step = lambda metrics: _raise_after(metrics.step, 5)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = trainer(tmp_path / "cut", total_steps=7, dtype=dtype, format=format)
    second.resume(second.store.last())
    assert second.step == 3
    second.train()
    assert straight.observer.losses[3:] == second.observer.losses
    other = weights(second)
    assert all(torch.equal(tensor, other[name]) for name, tensor in weights(straight).items())


def _raise_after(step: int, last: int) -> None:
    if step == last:
        raise KeyboardInterrupt


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_and_leaves_with_the_documented_status(tmp_path, number):
    one = trainer(tmp_path)
    one.observer.after_step = lambda metrics: os.kill(os.getpid(), number) if metrics.step == 4 else None
    with pytest.raises(Preempted, match=f"stopped by {number.name} after step 4 of 12") as caught:
        one.train()
    assert caught.value.exit_status == 75
    assert one.store.last().step == 4
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_its_sequences_and_saves_nothing(tmp_path):
    one = trainer(tmp_path, checkpoint_every=2)
    one.observer.after_step = lambda metrics: _poison(one) if metrics.step == 3 else None
    with pytest.raises(NonFiniteLossError, match=r"step 4: loss nan.*sequences are 24, 25, 26"):
        one.train()
    assert one.store.last().step == 2


def test_skipped_steps_are_counted_and_leave_the_weights_alone(tmp_path):
    one = trainer(tmp_path, total_steps=4, skip_nonfinite=True)
    before = {}

    def after_step(metrics):
        if metrics.step == 2:
            before.update(weights(one))
            one.model.forward = lambda *a, **k: _nan_output(type(one.model).forward(one.model, *a, **k))
        if metrics.step == 3:
            assert metrics.skipped
            assert all(torch.equal(tensor, before[name]) for name, tensor in weights(one).items())
            del one.model.forward

    one.observer.after_step = after_step
    summary = one.train()
    assert summary.skipped_steps == 1
    assert not one.observer.last.skipped


def _poison(one: Trainer) -> None:
    with torch.no_grad():
        one.model.norm.weight.fill_(float("nan"))


def _nan_output(output):
    return output._replace(loss_sum=output.loss_sum * float("nan"))


def test_validation_is_the_mean_over_target_tokens_and_changes_nothing(tmp_path):
    batches = next(iter(SyntheticSource(4)))
    one = trainer(tmp_path / "with", total_steps=4, validation=lambda: batches, validation_every=2)
    one.train()
    plain = trainer(tmp_path / "without", total_steps=4)
    plain.train()
    assert [step for step, _ in one.observer.validations] == [2, 4]
    assert one.observer.losses == plain.observer.losses
    with torch.no_grad():
        sums = [one.model(batch.tokens, targets=batch.targets).loss_sum for batch in batches]
    targets = sum(int((batch.targets >= 0).sum()) for batch in batches)
    assert one.observer.validations[-1][1] == pytest.approx(sum(sums).item() / targets, rel=1e-6)


def test_checkpoints_by_step_and_at_the_end_without_saving_twice(tmp_path):
    one = trainer(tmp_path, total_steps=6, checkpoint_every=3)
    summary = one.train()
    assert one.observer.saves == [3, 6]
    assert summary.checkpoint.endswith("step-00000006")


def test_a_disk_too_small_for_the_last_checkpoint_is_an_error_before_the_first_step(tmp_path, monkeypatch):
    usage = SimpleNamespace(total=10**6, used=10**6 - 10, free=10)
    monkeypatch.setattr("moescale.runtime.checkpoint_writer.shutil.disk_usage", lambda path: usage)
    one = trainer(tmp_path, total_steps=2)
    with pytest.raises(ConfigError, match="a checkpoint has .* bytes, the disk 10 left"):
        one.train()
    assert one.observer.losses == []


def test_a_checkpoint_is_written_once_its_minutes_are_over_and_its_step_is_done(tmp_path):
    seconds = 0.0

    def pass_time(metrics):
        nonlocal seconds
        seconds += 40.0

    one = trainer(tmp_path, total_steps=6, checkpoint_minutes=1.0, final_checkpoint=False)
    one.clock = lambda: seconds
    one.observer.after_step = pass_time
    summary = one.train()
    assert one.observer.saves == [2, 4, 6]
    assert summary.seconds == 240.0


def test_another_models_run_is_not_resumed(tmp_path):
    one = trainer(tmp_path, total_steps=1)
    one.train()
    other = trainer(tmp_path)
    other.identity = {"model": "0123456789abcdef"}
    with pytest.raises(CheckpointError, match="was written with model .* this run has 0123456789abcdef"):
        other.resume(other.store.last())


def test_fewer_steps_than_the_checkpoint_has_is_refused(tmp_path):
    one = trainer(tmp_path, total_steps=4)
    one.train()
    shorter = trainer(tmp_path, total_steps=2)
    with pytest.raises(ConfigError, match=r"run\.steps \(2\) must be at least 4"):
        shorter.resume(shorter.store.last())


def test_metrics_of_steps_done_again_appear_once(tmp_path):
    def run(total: int, resume: bool) -> None:
        with ObserverList(map(make_observer, DEFAULT_OBSERVERS)) as log:
            log.on_start(RunContext(folder=tmp_path, total_steps=total, flops_per_token=1e6, peak_flops=1e12))
            one = trainer(tmp_path / "checkpoints", total_steps=total, checkpoint_every=2)
            one.observer = log
            if resume:
                one.resume(one.store.at(4))
            log.on_finish(one.train())

    run(5, resume=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a line cut short by a kill
    run(7, resume=True)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6, 7]
    assert records[0]["mfu"] == pytest.approx(records[0]["tokens_per_second"] * 1e6 / 1e12)
    assert len(records[0]["expert_load_max"]) == 2
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_without_a_final_checkpoint_nothing_is_written(tmp_path):
    one = trainer(tmp_path / "checkpoints", total_steps=2, final_checkpoint=False)
    assert one.train().checkpoint is None
    assert not (tmp_path / "checkpoints").exists() and one.observer.saves == []
    every = trainer(tmp_path / "checkpoints", total_steps=3, final_checkpoint=False, checkpoint_every=2)
    assert every.train().checkpoint == str(tmp_path / "checkpoints" / "step-00000002")


def _always_nan(one: Trainer) -> None:
    one.model.forward = lambda *a, **k: _nan_output(type(one.model).forward(one.model, *a, **k))


@pytest.mark.parametrize("fields", [{"max_skipped_steps": 3}, {}, {"checkpoint_every": 1}])
def test_a_run_that_skips_every_step_fails(tmp_path, fields):
    one = trainer(tmp_path, total_steps=5, skip_nonfinite=True, **fields)
    _always_nan(one)
    rule = (
        r"step 3: 3 steps in a row \(run.max_skipped_steps\)" if "max_skipped_steps" in fields else "all 5 steps were"
    )
    with pytest.raises(NonFiniteLossError, match=rule) as caught:
        one.train()
    assert "No update was made before" in str(caught.value) and "learning_rate" not in str(caught.value)


def test_weights_that_the_last_update_spoils_are_not_saved_over_good_ones(tmp_path):
    one = trainer(tmp_path, total_steps=3, checkpoint_every=2)

    def after_step(metrics):
        if metrics.step == 3:
            _poison(one)

    one.observer.after_step = after_step
    with pytest.raises(NonFiniteLossError, match=r"step 3: the weights are no longer finite, 'norm.weight' among them"):
        one.train()
    assert [checkpoint.step for checkpoint in one.store.list()] == [2]


def test_a_run_that_resumes_says_which_settings_differ_and_goes_on(tmp_path):
    trainer(tmp_path, total_steps=2, learning_rate=1e-3).train()
    notices: list[str] = []
    two = trainer(tmp_path, total_steps=4, learning_rate=3e-4, weight_decay=0.2)
    two.on_notice = notices.append
    two.resume(two.store.last())
    two.train()
    assert notices == [
        "differs from the checkpoint: learning_rate 0.001 -> 0.0003, weight_decay 0.1 -> 0.2, steps 2 -> 4 (the "
        "schedule is computed anew)"
    ]
    again = trainer(tmp_path, total_steps=4, learning_rate=3e-4, weight_decay=0.2)
    again.on_notice = notices.append
    again.resume(again.store.last())
    assert len(notices) == 1


class Recording(TrainerHook):
    """Notes what it is told, and the weights at that time."""

    def __init__(self) -> None:
        self.updates: list[tuple[int, int]] = []
        self.weights: list[torch.Tensor] = []
        self.validations: list[tuple[int, float]] = []

    def after_update(self, update):
        self.updates.append((update.step, int(update.expert_rows[0].sum())))
        self.weights.append(update.model.embedding.weight.detach().clone())
        return {"doubled": 2.0 * update.step}

    def after_validation(self, step, loss):
        self.validations.append((step, loss))


def test_a_hook_is_called_after_updates_and_validations_and_not_for_a_skipped_step(tmp_path):
    hook = Recording()
    held_out = next(iter(SyntheticSource()))
    one = trainer(
        tmp_path, total_steps=4, hooks=[hook], validation=lambda: held_out, validation_every=2, skip_nonfinite=True
    )

    def poison(metrics):
        if metrics.step in (1, 2):
            with torch.no_grad():
                one.model.norm.weight.fill_(float("nan") if metrics.step == 1 else 1.0)

    one.observer.after_step = poison
    one.train()
    routed = 8 * SEQUENCE_LENGTH * one.model.config.top_k
    assert hook.updates == [(1, routed), (3, routed), (4, routed)]
    assert not torch.equal(hook.weights[0], hook.weights[1])
    assert torch.equal(hook.weights[-1], one.model.embedding.weight)
    assert one.observer.last.extra == {"doubled": 8.0}
    assert [step for step, _ in hook.validations] == [2, 4]
    assert hook.validations[-1] == one.observer.validations[-1]
