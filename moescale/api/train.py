"""Training as a function: a request goes in, a summary comes out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moescale import __version__
from moescale.api.run_checks import (
    check_corpus,
    check_devices,
    check_weights,
    choose_plan,
    is_pretrained,
    out_of_memory,
)
from moescale.api.samples import make_sampler
from moescale.api.train_request import TrainRequest, request_arguments
from moescale.api.vocabulary import vocabulary_notice
from moescale.config import ModelConfig
from moescale.convert.adapter import read_adapter
from moescale.convert.checkpoint import kept_tensors
from moescale.convert.hf_config import read_model_config, resolve_model
from moescale.coordinates import Coordinates
from moescale.data.corpus import Corpus, Verification, open_corpus
from moescale.data.loader import Loader, validation_batches
from moescale.errors import CheckpointError, ConfigError, MoescaleError, printable, say
from moescale.files import write_atomically
from moescale.kernels.backends import BackendSettings, default_backends
from moescale.models.flops import flops_per_token, peak_flops
from moescale.plan import ParallelPlan
from moescale.records import FileKind, build, read_json_object
from moescale.report.metrics import TrainSummary, to_json
from moescale.report.observer import Observer, RunContext
from moescale.report.registry import ObserverList, make_observer
from moescale.runtime.checkpoint import Checkpoint, CheckpointStore, DamagedCheckpointError, read_training_state
from moescale.runtime.device import choose_device, make_deterministic
from moescale.runtime.frozen import frozen_digest
from moescale.runtime.hooks import TrainerHook
from moescale.runtime.judge import first_line
from moescale.runtime.launch import Membership, join_ranks, run_local_ranks, was_launched
from moescale.runtime.mapping import compile_layers, optimizer_format
from moescale.runtime.output_lock import hold_output
from moescale.runtime.profiling import KERNELS_FILE, WARM_UP_STEPS, StepProfiler
from moescale.runtime.ranks import Ranks, place_on_host
from moescale.runtime.samples import Sampler
from moescale.runtime.session import PlacedModel, place_model
from moescale.runtime.train import Trainer
from moescale.tools.preflight import Job, examine_job
from moescale.tools.profile_table import read_profile, table

RUN_FILE = "run.json"
MACHINE_FILE = "machine.json"
SUMMARY_FILE = "summary.json"
_SUMMARY = FileKind(noun="a run's summary", error=MoescaleError)


class LocalRanksError(MoescaleError):
    """One of the processes that a run started has failed, and has printed why; ``exit_status`` is that of the run."""

    def __init__(self, exit_status: int, logs: Path) -> None:
        super().__init__(f"the run's processes ended with status {exit_status}; the reason is above, or in {logs}")
        self.exit_status = exit_status


def train(
    request: TrainRequest, *, observers: Sequence[Observer] = (), hooks: Sequence[TrainerHook] = ()
) -> TrainSummary:
    """Train a model: start the run, or continue the one in ``request.output``.

    A process that torchrun started is one rank of the run, and returns when all are done. Otherwise a plan for one
    device runs in this process, and one for several starts a process ``moescale run`` for each.

    Args:
        observers: told of the run in addition to those that ``request.observers`` names, on the first rank.
        hooks: take part in the training, on every rank.

    Returns:
        How the run ended, the same on every rank.

    Raises:
        ConfigError: model, corpus, plan, settings and devices do not fit together.
        CheckpointError: the weights or the checkpoint to start from cannot be used.
        NonFiniteLossError: loss or weights became NaN or infinite.
        Preempted: SIGTERM or Ctrl-C; the state is saved, and the same call continues.
        RankFailure: another rank failed or hangs.
        LocalRanksError: a process that this one started has failed.
    """
    run = _prepare(request, observers, hooks)
    plan = run.plan
    if plan.runtime_gpus > 1 and not was_launched():
        return _train_on_local_ranks(run)
    if request.deterministic:
        make_deterministic()
    with join_ranks(run.device, hang_seconds=request.hang_seconds) as member:
        with hold_output(request.output, member.ranks), _verifying(run, member) as verification:
            with _advising(request), _chosen_backends(request, member) as backends:
                return _Rank(run, member, verification, backends).train()


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A request with what it names opened and checked."""

    request: TrainRequest
    folder: Path
    """Of the model."""
    config: ModelConfig
    corpus: Corpus
    plan: ParallelPlan
    device: torch.device
    observers: Sequence[Observer]
    own_observers: Sequence[Observer]
    """Those of ``observers`` that the request does not name, so that no other process can make them."""
    hooks: Sequence[TrainerHook]


def _prepare(request: TrainRequest, observers: Sequence[Observer], hooks: Sequence[TrainerHook]) -> _Run:
    folder = resolve_model(request.model)
    config = read_model_config(folder, request.ignore_config_field)
    corpus = open_corpus(request.data)
    device = choose_device(request.device)
    plan = choose_plan(request, config, corpus, device)
    check_corpus(config, corpus, plan)
    check_weights(request, folder, plan)
    check_devices(request, plan, device)
    named = [make_observer(name) for name in request.observers]
    return _Run(
        request=request,
        folder=folder,
        config=config,
        corpus=corpus,
        plan=plan,
        device=device,
        observers=[*named, *observers],
        own_observers=observers,
        hooks=hooks,
    )


def _train_on_local_ranks(run: _Run) -> TrainSummary:
    request = run.request
    if run.own_observers or run.hooks:
        given = "observers" if run.own_observers else "hooks"
        raise ConfigError(
            f"train was given {given}, which the {run.plan.runtime_gpus} processes of the plan cannot be given; start "
            "this script with torchrun, or name observers as module:class in run.observers"
        )
    with hold_output(request.output):
        pass  # in use: refused here already, before the ranks write to the other run's logs
    logs = request.output / "logs"
    status = run_local_ranks(run.plan.runtime_gpus, request_arguments(request), logs)
    if status:
        raise LocalRanksError(status, logs)
    path = request.output / SUMMARY_FILE
    return build(TrainSummary, read_json_object(path, _SUMMARY), str(path), _SUMMARY)


@contextmanager
def _advising(request: TrainRequest) -> Iterator[None]:
    """Give errors of host memory and damaged checkpoints their remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise ConfigError(
            f"host memory is exhausted ({first_line(str(error))}); give the run more of it, or a smaller model "
            "or micro-batch"
        ) from error
    except DamagedCheckpointError as error:
        # Not what has just been tried.
        others = CheckpointStore(request.output / "checkpoints", keep=1).list()[:-1]
        if request.resume == "last" and others:
            advice = "pass --resume last-good to go on from the newest whole one"
        else:
            advice = "bring it back from a copy, or start anew with another --output"
        raise CheckpointError(f"{error}; {advice}") from error


@contextmanager
def _chosen_backends(request: TrainRequest, member: Membership) -> Iterator[BackendSettings]:
    """Run the kernels on the backends that the request or, with a notice, the environment asks for."""
    asked = BackendSettings(experts=request.experts_backend, attention=request.attention_backend)
    chosen, notices = asked.overridden_by_environment()
    for notice in notices:
        _warn(notice, member.ranks)
    with default_backends(chosen):
        yield chosen


@contextmanager
def _verifying(run: _Run, member: Membership) -> Iterator[Verification]:
    """Begin to verify the run's corpus and its validation split; a small one is verified when the block begins."""
    vocabulary = vocabulary_notice(run.request.data, run.config, run.folder) if member.ranks.is_first else None
    for notice in [*run.corpus.notices, *([vocabulary] if vocabulary else [])]:
        _warn(notice, member.ranks)
    validation = open_corpus(run.request.data, split="validation", missing_ok=True)
    part, num_parts = place_on_host()
    with Verification(
        [run.corpus] if validation is None else [run.corpus, validation],
        part=part,
        num_parts=num_parts,
        on_progress=lambda: member.progress(0, "verifying the corpus"),
    ) as verification:
        yield verification


class _Rank:
    """One rank's part of a run; only the first one has observers and writes what is written once."""

    def __init__(self, run: _Run, member: Membership, verification: Verification, backends: BackendSettings) -> None:
        self.run = run
        self.request = run.request
        self.settings = run.request.settings
        self.member = member
        self.ranks = member.ranks
        self.verification = verification
        self.backends = backends
        self.store = CheckpointStore(run.request.output / "checkpoints", self.settings.keep_checkpoints)

    def train(self) -> TrainSummary:
        """Build, fill or resume the model, and do the run's steps. A collective."""
        plan, device = self.run.plan, self.member.device
        self.member.progress(0, "building the model")
        checkpoint = self._checkpoint_to_resume()
        total_steps = self.settings.steps or _steps_of_one_epoch(self.run.corpus, plan, checkpoint)
        self._examine_machine(total_steps - (checkpoint.step if checkpoint else 0))
        placed = place_model(self.run.config, plan, self.ranks, device)
        if self.request.compile or (self.request.compile is None and device.type == "cuda"):
            compile_layers(placed.model)
        if checkpoint is None or plan.lora is not None:  # whose checkpoints hold adapters alone
            self._fill(placed)
            if self.request.adapter is not None and checkpoint is None:
                assert plan.lora is not None
                placed.import_adapters(read_adapter(self.request.adapter, self.run.config, plan.lora))
        with ObserverList(self.run.observers if self.ranks.is_first else ()) as observer:
            if self.ranks.is_first:
                self.request.output.mkdir(parents=True, exist_ok=True)
                observer.on_start(self._context(total_steps, is_resumed=checkpoint is not None))
            profiler = self._profiler()
            trainer = self._trainer(placed, total_steps, observer, profiler)
            if checkpoint is not None:
                self._resume(trainer, checkpoint)
            if self.ranks.is_first:
                write_atomically(self.request.output / RUN_FILE, to_json(self._document(), indent=2))
                (self.request.output / SUMMARY_FILE).unlink(missing_ok=True)
            try:
                with profiler or nullcontext():
                    summary = trainer.train()
            except torch.OutOfMemoryError as error:
                raise out_of_memory(plan, device, trainer.step) from error
            self._check_verification()
            observer.on_finish(summary)
            if profiler is not None:
                self._report_profile(profiler)
            if self.ranks.is_first:
                write_atomically(self.request.output / SUMMARY_FILE, to_json(asdict(summary), indent=2))
        return summary

    def _examine_machine(self, steps_left: int) -> None:
        """Warn of what this machine lacks for the run, and refuse what cannot go well. A collective."""
        started = time.perf_counter()
        job = Job(
            config=self.run.config,
            plan=self.run.plan,
            settings=self.settings,
            backends=self.backends,
            device=self.member.device,
            checkpoints=self.store.folder,
            num_checkpoints=len(self.store.list()),
            steps_left=steps_left,
        )
        own = list(examine_job(job, is_first=self.ranks.is_first))
        findings = list(dict.fromkeys(finding for of_rank in self.ranks.gather(own) for finding in of_rank))
        if self.ranks.is_first:
            self.request.output.mkdir(parents=True, exist_ok=True)
            document = {"seconds": time.perf_counter() - started, "findings": [asdict(finding) for finding in findings]}
            write_atomically(self.request.output / MACHINE_FILE, to_json(document, indent=2))
        problems = [finding for finding in findings if finding.status == "problem"]
        if problems and self.request.check_machine:
            text = "; also ".join(f"{finding.name}: {finding.detail}; {finding.remedy}" for finding in problems)
            # A disk without room for one checkpoint ends the run anyway, by the trainer's own check.
            is_final = any(finding.name == "disk" for finding in problems)
            raise ConfigError(text if is_final else f"{text} (--no-check-machine starts nevertheless)")
        for finding in findings:
            if finding.status in ("warning", "problem"):
                self._warn(f"{finding.name}: {finding.detail}; {finding.remedy}")

    def _profiler(self) -> StepProfiler | None:
        request, device = self.request, self.member.device
        if not request.profile:
            return None
        return StepProfiler(request.output / "profile", request.profile, device, is_first=self.ranks.is_first)

    def _report_profile(self, profiler: StepProfiler) -> None:
        if not self.ranks.is_first:
            return
        if not profiler.is_done:
            steps = WARM_UP_STEPS + self.request.profile
            self._warn(f"nothing was profiled: --profile {self.request.profile} needs {steps} steps in one go")
            return
        text = table(
            read_profile(profiler.folder / KERNELS_FILE),
            self.run.plan,
            self.run.config,
            peak_flops(self.member.device),
        )
        write_atomically(profiler.folder / "table.txt", text + "\n")
        say(text, sys.stderr)

    def _trainer(
        self, placed: PlacedModel, total_steps: int, observer: Observer, profiler: StepProfiler | None
    ) -> Trainer:
        run, plan = self.run, self.run.plan
        source = Loader(
            run.corpus,
            sequences_per_step=plan.sequences_per_step,
            micro_batch_sequences=plan.micro_batch_sequences,
            seed=self.settings.seed,
            coordinates=placed.coordinates,
            verification=self.verification,
        )
        return Trainer(
            model=placed.model,
            settings=self.settings,
            total_steps=total_steps,
            source=source,
            store=self.store,
            observer=observer,
            hooks=[*run.hooks, *([profiler] if profiler else [])],
            optimizer_format=optimizer_format(plan),
            validation=self._validation(placed.coordinates),
            sampler=self._sampler(),
            identity={"model": run.config.fingerprint(), "corpus": run.corpus.fingerprint} | self._frozen(placed),
            ranks=self.ranks,
            coordinates=placed.coordinates,
            parts=placed.parts,
            plan=asdict(plan),
            on_progress=self.member.progress,
            on_notice=self._warn,
        )

    def _frozen(self, placed: PlacedModel) -> dict[str, str]:
        """What is trained, and which frozen weights it belongs to: for a checkpoint, which does not hold them."""
        lora = self.run.plan.lora
        if lora is None:
            return {"adapters": "none"}
        self.member.progress(0, "digest of the frozen weights")
        digest = frozen_digest(placed.model, placed.parts, self.ranks)
        return {"adapters": lora.text(), "frozen weights": digest}

    def _context(self, total_steps: int, *, is_resumed: bool) -> RunContext:
        device = self.member.device
        device_flops = peak_flops(device)
        return RunContext(
            folder=self.request.output,
            total_steps=total_steps,
            flops_per_token=flops_per_token(self.run.config, self.run.plan.sequence_length, self.run.plan.lora),
            peak_flops=device_flops * self.ranks.size if device_flops else None,
            experts_per_token=self.run.config.top_k,
            device_bytes=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
            is_resumed=is_resumed,
            document=self._document(),
        )

    def _document(self) -> dict[str, Any]:
        """What `export` and a reader of the run need to know of it."""
        return {
            "moescale": __version__,
            "model": str(self.run.folder.resolve()),
            "data": str(self.request.data.resolve()),
            "ignore_config_field": self.request.ignore_config_field,
            "backends": asdict(self.backends),
            "settings": asdict(self.settings),
            "plan": asdict(self.run.plan),
        }

    def _checkpoint_to_resume(self) -> Checkpoint | None:
        if self.request.resume == "last-good":
            return self.store.last_good(
                self.ranks,
                on_skip=lambda problem: self._warn(f"skipped a damaged checkpoint: {problem}"),
                on_progress=lambda: self.member.progress(0, "checking checkpoints"),
            )
        last = self.ranks.gather(self.store.last() if self.ranks.is_first else None)[0]
        if last is not None and self.request.resume == "never":
            raise CheckpointError(
                f"{last.path}: --resume never, but this output already holds a run; choose another --output"
            )
        return last

    def _resume(self, trainer: Trainer, checkpoint: Checkpoint) -> None:
        for path in trainer.resume(checkpoint):
            self._warn(f"a checkpoint after step {trainer.step} was moved to {path}; delete it when it is not needed")

    def _fill(self, placed: PlacedModel) -> None:
        """Give the model the weights a run starts from, and print a line that says which."""
        folder = self.run.folder
        pretrained = is_pretrained(self.request, folder)
        if self.ranks.is_first:
            source = f"from {folder}" if pretrained else f"random, seed {self.settings.seed}"
            say(printable(f"weights: {source}"), sys.stderr)
        if pretrained:
            placed.import_weights(folder, lambda done, total: self.member.progress(0, "importing weights"))
            placed.initialize_adapters(self.settings.seed)
            kept = kept_tensors(folder, placed.model.config)
            if kept:
                self._warn(
                    f"the {len(kept)} tensors for multi-token prediction in {folder} are not trained; `export` keeps "
                    "them as they are"
                )
        else:
            placed.initialize(self.settings.seed)

    def _validation(self, coordinates: Coordinates) -> Callable[[], Iterable[Any]] | None:
        data = self.request.data
        corpus = open_corpus(data, split="validation", missing_ok=True)
        if corpus is None:
            if self.settings.validation_every:
                raise ConfigError(
                    f"run.validation_every ({self.settings.validation_every}) needs a validation split, which {data} "
                    "lacks; prepare it with --validation-fraction"
                )
            return None
        return lambda: validation_batches(
            corpus,
            micro_batch_sequences=self.run.plan.micro_batch_sequences,
            coordinates=coordinates,
            limit=self.settings.validation_sequences,
        )

    def _sampler(self) -> Sampler | None:
        if not self.settings.sample_every:
            return None
        return make_sampler(self.request.data, self.run.folder, self.settings, self._warn)

    def _check_verification(self) -> None:
        verification = self.verification
        verification.check()
        if not verification.is_done:
            share = verification.verified_bytes / max(1, verification.num_bytes)
            self._warn(f"the run ended before its corpus was verified: {share:.0%} of {self.request.data} was")

    def _warn(self, text: str) -> None:
        _warn(text, self.ranks)


def _steps_of_one_epoch(corpus: Corpus, plan: ParallelPlan, checkpoint: Checkpoint | None) -> int:
    """Steps in all until the rest of the epoch holds no further whole step; those of ``checkpoint`` are done.

    They may have taken other numbers of sequences than this plan does.
    """
    done, position = 0, 0
    if checkpoint is not None:
        state = read_training_state(checkpoint)
        done, position = state["step"], state["source"]["position"]
    return max(1, done + max(0, corpus.num_sequences - position) // plan.sequences_per_step)


def _warn(text: str, ranks: Ranks) -> None:
    if ranks.is_first:
        say(printable(f"warning: {text}"), sys.stderr)
