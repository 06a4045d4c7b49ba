"""The training loop: steps of accumulated micro-batches, validation, checkpoints, resuming and stopping.

One step: every micro-batch contributes ``sum of its token losses / target tokens of the whole step`` plus
``aux_loss_alpha * auxiliary loss / number of micro-batches``, both counted over all ranks, so neither term depends on
how a step is split into micro-batches or sharded. The host waits for the device once per step, when it reads the loss.
Decisions that depend on time, signals or losses are agreed on by all ranks, so that all enter the same collectives.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from moescale.coordinates import ONE_DEVICE, Coordinates
from moescale.errors import MoescaleError, NonFiniteLossError, Preempted
from moescale.models.fp8_gemms import multiplies_in_fp8, write_weight_copies
from moescale.models.transformer import Transformer
from moescale.report.metrics import StepMetrics, TrainSummary
from moescale.report.observer import Observer
from moescale.runtime.checkpoint import Checkpoint, load, read_training_state
from moescale.runtime.checkpoint_store import CheckpointStore
from moescale.runtime.checkpoint_weights import WEIGHTS_PREFIX
from moescale.runtime.checkpoint_writer import CheckpointWriter
from moescale.runtime.fp8_errors import as_metrics, fp8_errors
from moescale.runtime.hooks import TrainerHook, Update
from moescale.runtime.layout import Part, whole
from moescale.runtime.mapping import sum_over_replicas_at_the_last
from moescale.runtime.micro_batch import MicroBatches
from moescale.runtime.nonfinite import NonFiniteGuard
from moescale.runtime.optimizer import AdamW, OptimizerFormat
from moescale.runtime.random_state import random_state, restore_random_state
from moescale.runtime.ranks import ONE_RANK, Ranks
from moescale.runtime.resume_checks import changes_since, check_resumable
from moescale.runtime.samples import Sampler
from moescale.runtime.settings import TrainSettings, learning_rate_at, warmup_problem
from moescale.runtime.step_source import Batch, StepSource
from moescale.runtime.stop_request import StopRequest
from moescale.runtime.validation import validation_loss


class Trainer:
    """Trains ``model`` on ``source`` until ``total_steps``, keeping its state in ``store``."""

    def __init__(
        self,
        *,
        model: Transformer,
        settings: TrainSettings,
        total_steps: int,
        source: StepSource,
        store: CheckpointStore,
        observer: Observer,
        optimizer_format: OptimizerFormat = OptimizerFormat(),  # noqa: B008 - frozen
        validation: Callable[[], Iterable[Batch]] | None = None,
        sampler: Sampler | None = None,
        identity: dict[str, str] | None = None,
        ranks: Ranks = ONE_RANK,
        coordinates: Coordinates = ONE_DEVICE,
        parts: Mapping[str, Part] | None = None,
        hooks: Sequence[TrainerHook] = (),
        plan: dict[str, Any] | None = None,
        on_progress: Callable[[int, str], None] = lambda step, phase: None,
        on_notice: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        model: on several ranks, sharded by :func:`moescale.runtime.mapping.apply_plan`.
        source: yields the micro-batches of this rank's data rank, equally many on every rank.
        validation: returns such micro-batches of the validation split.
        sampler: generates samples every ``settings.sample_every`` steps.
        identity: fingerprints of the model and the like; saved, and compared with those of a checkpoint on resume.
        coordinates: this rank's coordinates in the mesh.
        parts: this rank's part of each parameter; None if it holds all.
        hooks: called on every rank.
        plan: stored in checkpoints for the reader.
        on_progress: called with the number of steps done and the phase that begins.
        on_notice: called with messages to the user that do not end the run.
        clock: returns seconds.
        """
        assert coordinates.num_ranks == ranks.size, "the coordinates of another number of ranks"
        self.model = model
        self.settings = settings
        self.total_steps = total_steps
        self.source = source
        self.store = store
        self.writer = CheckpointWriter(
            store,
            ranks,
            in_background=settings.background_checkpoints,
            on_progress=lambda: self.on_progress(self.step, "writing a checkpoint"),
            on_notice=on_notice,
        )
        self.observer = observer
        self.validation = validation
        self.sampler = sampler
        self.identity = identity or {}
        self.ranks = ranks
        self.coordinates = coordinates
        self.hooks = hooks
        self.plan = plan
        self.on_progress = on_progress
        self.on_notice = on_notice
        self.clock = clock
        self.optimizer = AdamW(model.named_parameters(), settings, optimizer_format, parts=parts, ranks=ranks)
        self.optimizer.accumulate_in_gemms(model)
        write_weight_copies(model)
        self._measures_fp8 = multiplies_in_fp8(model) and ranks.size == 1
        self.buffers = {} if model.is_frozen else dict(model.named_buffers())
        """Buffers that training updates, the same on every rank."""
        self.micro_batches = MicroBatches(model, capture=settings.cuda_graphs)
        self.device = next(model.parameters()).device
        self.step = 0
        self.nonfinite = NonFiniteGuard(settings, self.optimizer, ranks, coordinates)
        self._allocator_retries = 0
        self._last_loss: float | None = None
        self._validation_loss: float | None = None
        self._save_seconds = 0.0
        self._checkpoint: Checkpoint | None = None  # committed last, or resumed from

    def resume(self, checkpoint: Checkpoint) -> Sequence[Path]:
        """Continue from ``checkpoint``: weights, optimizer, data position, random state and counters. A collective.

        Returns the new paths of the store's checkpoints of later steps, which were set aside.
        """
        stored = read_training_state(checkpoint)
        check_resumable(
            checkpoint.path,
            stored,
            total_steps=self.total_steps,
            identity=self.identity,
            optimizer_format=self.optimizer.format,
        )
        changes = changes_since(stored, self.settings, self.plan, self.total_steps)
        if changes:
            self.on_notice(f"differs from the checkpoint: {', '.join(changes)}")

        def loading() -> None:
            self.on_progress(stored["step"], "loading the checkpoint")

        # Weights are loaded last, because nothing may fail once they are changed.
        self.source.load_state_dict(stored["source"])
        state = load(checkpoint, self._tensors(), self._tensor_parts(), self.ranks, loading)
        self.optimizer.finish_load(state["num_updates"])
        write_weight_copies(self.model)
        restore_random_state(state, self.device, checkpoint.path)
        self.step = state["step"]
        self.nonfinite.skipped_steps = state["skipped_steps"]
        self._checkpoint = checkpoint
        self.observer.on_resume(self.step, checkpoint.path)
        return self.store.set_aside_after(self.step, self.ranks)

    def train(self) -> TrainSummary:
        """Run the remaining steps.

        Raises:
            NonFiniteLossError: a loss, gradient norm or weight is not finite and may not be skipped.
            Preempted: a signal asked to stop; the state is saved.
            ConfigError: before the first step, the disk has no room for a checkpoint.
        """
        if self.step < self.total_steps and self.settings.writes_checkpoints:
            self.writer.check_room(self._tensors(), self._tensor_parts())
        self.writer.tidy(self.step)
        problem = warmup_problem(self.settings, self.total_steps)
        if problem is not None and self.step < self.total_steps:
            self.on_notice(problem)
        started, first_step, tokens = self.clock(), self.step, 0
        last_saved_step, last_saved_time = self.step if self.step else None, self.clock()
        steps = iter(self.source)
        with StopRequest() as stop, self._finishing_checkpoints():
            while self.step < self.total_steps:
                self.on_progress(self.step, "waiting for data")
                asked = self.clock()
                batches = next(steps)
                metrics = self.train_step(batches, data_seconds=self.clock() - asked)
                tokens += metrics.tokens
                self.observer.on_step(metrics)
                if self._due(self.settings.validation_every):
                    self._validate()
                if self._due(self.settings.sample_every):
                    self._sample()
                minutes = (self.clock() - last_saved_time) / 60
                by_time = 0 < self.settings.checkpoint_minutes <= minutes
                stop_asked, minutes_over, still_writing = self.ranks.sum_on_host(
                    [bool(stop.signal_name), by_time, self.writer.is_pending and not self.writer.is_written]
                )
                if self.writer.is_pending and not still_writing:
                    self._commit()
                if self._due(self.settings.checkpoint_every) or minutes_over or stop_asked:
                    self._save()
                    last_saved_step, last_saved_time = self.step, self.clock()
                if stop_asked and self.step < self.total_steps:
                    self._commit()
                    raise Preempted(
                        f"stopped by {self._name_of_signal(stop)} after step {self.step} of {self.total_steps}; the "
                        f"state is saved in {self.store.folder}, the same command resumes"
                    )
            if self.validation is not None and not self._due(self.settings.validation_every):
                self._validate()
            self.nonfinite.check_outcome(self.step, self.step - first_step)
            if self.settings.final_checkpoint and last_saved_step != self.step:
                self._save()
        return TrainSummary(
            steps=self.step,
            tokens=tokens,
            seconds=self.clock() - started,
            final_loss=self._last_loss,
            validation_loss=self._validation_loss,
            skipped_steps=self.nonfinite.skipped_steps,
            resumed_from_step=first_step or None,
            checkpoint=str(self._checkpoint.path) if self._checkpoint else None,
        )

    @contextmanager
    def _finishing_checkpoints(self) -> Iterator[None]:
        """Commit a pending checkpoint when the loop ends, even by an error that all ranks raise."""
        try:
            yield
        except BaseException as error:
            if self.writer.is_pending and (self.ranks.size == 1 or isinstance(error, NonFiniteLossError)):
                try:
                    self._commit()
                except MoescaleError as second:  # the first error is the reason why the run ends
                    self.on_notice(str(second))
            raise
        if self.writer.is_pending:
            self._commit()

    def _name_of_signal(self, stop: StopRequest) -> str:
        return next(name for name in self.ranks.gather(stop.signal_name) if name)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def train_step(self, batches: Sequence[Batch], data_seconds: float = 0.0) -> StepMetrics:
        """Run one step on this rank's micro-batches, and return its metrics. A collective.

        Raises NonFiniteLossError where loss or gradient norm is not finite and the step may not be skipped.
        """
        started = self.clock()
        # Targets of the whole step are counted on the host, where the batches already are.
        num_targets, num_tokens, num_micro_batches = self._sum_over_batches(
            sum(int((batch.targets >= 0).sum()) for batch in batches),
            sum(batch.tokens.numel() for batch in batches),
            len(batches),
        )
        sums = self.micro_batches
        sums.start_step(num_targets=num_targets, num_micro_batches=num_micro_batches)
        for number, batch in enumerate(batches, start=1):
            self.on_progress(self.step, sums.phase(number))
            sum_over_replicas_at_the_last(self.model, last=number == len(batches))
            if self.model.has_dropout:
                torch.manual_seed(self._dropout_seed(number))
            sums.run(batch.tokens, batch.targets, batch.document_starts, batch.padding)
        self.on_progress(self.step, "gradient sums, norm and update")
        sums.add_up(self.ranks, self.coordinates)
        self.optimizer.sum_gradients(lambda: self.on_progress(self.step, "gradient sums, norm and update"))
        gradient_norm = self.optimizer.gradient_norm()
        mean_loss, norm = (sums.loss_sum / max(1, num_targets)).item(), gradient_norm.item()
        learning_rate = learning_rate_at(self.settings, self.step, self.total_steps)
        skipped = not (math.isfinite(mean_loss) and math.isfinite(norm))
        if skipped:
            self.optimizer.zero_gradients()
            self.nonfinite.skip(self.step + 1, batches, mean_loss, norm)
        else:
            self.optimizer.step(learning_rate, gradient_norm)
            write_weight_copies(self.model)
            if not self.model.is_frozen:  # frozen weights keep the biases they were trained with
                self.model.move_choice_biases(sums.expert_rows, self.settings.router_bias_update_rate)
            self._last_loss = mean_loss
            self.nonfinite.note_update()
        extra = {} if skipped else self._after_update(sums.expert_rows)
        self.step += 1
        every = self.settings.fp8_errors_every
        if self._measures_fp8 and every and (self.step == 1 or self._due(every)):
            extra |= self._fp8_errors(batches)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        num_moe_layers = max(1, self.model.config.num_moe_layers)
        return StepMetrics(
            step=self.step,
            loss=mean_loss,
            aux_loss=sums.aux_loss.item() / num_micro_batches / num_moe_layers,
            learning_rate=learning_rate,
            gradient_norm=norm,
            tokens=num_tokens,
            step_seconds=self.clock() - started,
            data_seconds=data_seconds,
            peak_bytes=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0,
            allocator_retries=self._new_allocator_retries(),
            expert_load=_relative_load(sums.expert_rows),
            skipped=skipped,
            extra=extra,
        )

    def _new_allocator_retries(self) -> int:
        """Return the allocator's retries since the last call; each one stalls the GPU."""
        if self.device.type != "cuda":
            return 0
        before = self._allocator_retries
        self._allocator_retries = torch.cuda.memory_stats(self.device)["num_alloc_retries"]
        return self._allocator_retries - before

    def _after_update(self, expert_rows: torch.Tensor) -> dict[str, float]:
        """Call the hooks and return their metrics."""
        extra: dict[str, float] = {}
        for hook in self.hooks:
            extra |= hook.after_update(Update(step=self.step + 1, model=self.model, expert_rows=expert_rows)) or {}
        return extra

    def _fp8_errors(self, batches: Sequence[Batch]) -> dict[str, float]:
        self.on_progress(self.step, "errors of rounding to fp8")
        try:
            errors = fp8_errors(self.model, batches, self.optimizer.zero_gradients)
        except torch.OutOfMemoryError:  # a measurement must not end a run
            self._measures_fp8 = False
            self.on_notice("no memory is left to measure the errors of rounding to fp8; the run goes on without")
            return {}
        return as_metrics(errors)

    def _dropout_seed(self, micro_batch: int) -> int:
        """Return a seed per micro-batch and data rank, so that a resumed run drops the same values."""
        text = f"{self.settings.seed}/{self.step}/{micro_batch}/{self.coordinates.data_rank}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def _sum_over_batches(self, *numbers: int) -> list[int]:
        """Sum numbers over the batches of all ranks, counting once a batch that several ranks read."""
        return self.ranks.sum_on_host([number * self.coordinates.counts_batches for number in numbers])

    def _validate(self) -> None:
        if self.validation is None:
            return
        loss = validation_loss(
            self.model,
            self.validation(),
            self.ranks,
            self.coordinates,
            on_batch=lambda: self.on_progress(self.step, "validation"),
        )
        if loss is not None:
            self._validation_loss = loss
            self.observer.on_validation(self.step, loss)
            for hook in self.hooks:
                hook.after_validation(self.step, loss)

    def _sample(self) -> None:
        if self.sampler is not None:
            samples = self.sampler.samples(
                self.model, self.ranks, lambda: self.on_progress(self.step, "generating samples")
            )
            self.observer.on_samples(self.step, samples)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return everything a checkpoint must hold, as ``KIND.NAME``."""
        buffers = {f"{WEIGHTS_PREFIX}{name}": buffer for name, buffer in self.buffers.items()}
        return self.optimizer.tensors() | buffers

    def _tensor_parts(self) -> dict[str, Part]:
        """Return the parts of the :meth:`_tensors`; the first rank of a stage writes its buffers."""
        is_first_copy = self.coordinates.writes_stage
        parts = {
            f"{WEIGHTS_PREFIX}{name}": replace(whole(buffer.shape), is_first_copy=is_first_copy)
            for name, buffer in self.buffers.items()
        }
        return self.optimizer.tensor_parts() | parts

    def _save(self) -> None:
        """Begin the checkpoint of this step, after committing a pending one."""
        if self.writer.is_pending:
            self._commit()
        self.on_progress(self.step, "checkpoint")
        self.nonfinite.check_weights(self.step)
        started = self.clock()
        state = {
            "step": self.step,
            "skipped_steps": self.nonfinite.skipped_steps,
            "num_updates": self.optimizer.num_updates,
            "source": self.source.state_dict(),
            "identity": self.identity,
            "settings": asdict(self.settings),
            "plan": self.plan,
            "total_steps": self.total_steps,
            **random_state(self.device),
        }
        self.writer.begin(self.step, state, self._tensors(), self._tensor_parts())
        self._save_seconds = self.clock() - started

    def _commit(self) -> None:
        self.on_progress(self.step, "commit of a checkpoint")
        started = self.clock()
        self._checkpoint = checkpoint = self.writer.commit()
        seconds = self._save_seconds + self.clock() - started
        self.observer.on_checkpoint(checkpoint.step, checkpoint.path, seconds)


def _relative_load(expert_rows: torch.Tensor) -> list[list[float]]:
    rows = expert_rows.double()  # [MoE layers, E]
    return (rows / rows.mean(dim=-1, keepdim=True).clamp(min=1)).tolist()
