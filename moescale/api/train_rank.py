"""One rank's part of a run: builds and initializes or resumes the model, trains it, and writes the run's files."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch

from moescale import __version__
from moescale.api.open_run import OpenRun
from moescale.api.run_checks import is_pretrained, out_of_memory
from moescale.api.samples import make_sampler
from moescale.convert.adapter_folder import read_adapter
from moescale.convert.stored_layout import kept_tensors
from moescale.coordinates import Coordinates
from moescale.data.corpus import Corpus, Verification, open_corpus
from moescale.data.loader import Loader, validation_batches
from moescale.errors import CheckpointError, ConfigError, printable, say
from moescale.files import write_atomically
from moescale.kernels.backends import BackendSettings
from moescale.models.flops import flops_per_token, peak_flops
from moescale.plan import ParallelPlan
from moescale.report.metrics import TrainSummary, to_json
from moescale.report.observer import Observer, RunContext
from moescale.report.registry import ObserverList
from moescale.runtime.checkpoint import Checkpoint, read_training_state
from moescale.runtime.checkpoint_store import CheckpointStore
from moescale.runtime.frozen import frozen_digest
from moescale.runtime.join import Membership
from moescale.runtime.mapping import compile_layers, optimizer_format
from moescale.runtime.profiling import KERNELS_FILE, WARM_UP_STEPS, StepProfiler
from moescale.runtime.ranks import Ranks
from moescale.runtime.resume_checks import check_resumable
from moescale.runtime.samples import Sampler
from moescale.runtime.session import PlacedModel, place_model
from moescale.runtime.train import Trainer
from moescale.tools.preflight import Job, examine_job
from moescale.tools.profile_table import read_profile, table

RUN_FILE = "run.json"
MACHINE_FILE = "machine.json"
SUMMARY_FILE = "summary.json"


class TrainRank:
    """One rank's part of a run. Only the first rank has observers and writes the files of the run."""

    def __init__(self, run: OpenRun, member: Membership, verification: Verification, backends: BackendSettings) -> None:
        self.run = run
        self.request = run.request
        self.settings = run.request.settings
        self.member = member
        self.ranks = member.ranks
        self.verification = verification
        self.backends = backends
        self.store = CheckpointStore(run.request.output / "checkpoints", self.settings.keep_checkpoints)
        self.errors_in_fp8: dict[str, float] = {}
        """Relative Frobenius norm of what frozen weights in fp8 are off by, by kind of weight."""

    def train(self) -> TrainSummary:
        """Build the model, initialize or resume it, and run the steps. A collective."""
        plan, device = self.run.plan, self.member.device
        self.member.progress(0, "building the model")
        checkpoint = self._checkpoint_to_resume()
        total_steps = self.settings.steps or _steps_of_one_epoch(self.run.corpus, plan, checkpoint)
        if checkpoint is not None:  # before the weights are loaded, which takes minutes
            check_resumable(
                checkpoint.path,
                read_training_state(checkpoint),
                total_steps=total_steps,
                identity=self._identity(),
                optimizer_format=optimizer_format(plan),
            )
        self._examine_machine(total_steps - (checkpoint.step if checkpoint else 0))
        placed = place_model(self.run.config, plan, self.ranks, device)
        if self.request.compile or (self.request.compile is None and device.type == "cuda"):
            compile_layers(placed.model)
        if checkpoint is None or plan.lora is not None:  # checkpoints of adapters lack the base weights
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
        """Warn of problems of this machine, and raise ConfigError for those that would end the run. A collective."""
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
            # The trainer's own check would end the run on a disk without room for one checkpoint.
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
            identity=self._identity() | self._frozen(placed),
            ranks=self.ranks,
            coordinates=placed.coordinates,
            parts=placed.parts,
            plan=asdict(plan),
            on_progress=self._telling(observer),
            on_notice=self._warn,
        )

    def _telling(self, observer: Observer) -> Callable[[int, str], None]:
        """Tell the watchdog and the observers of a phase that begins."""

        def tell(step: int, phase: str) -> None:
            self.member.progress(step, phase)
            observer.on_phase(step, phase)

        return tell

    def _identity(self) -> dict[str, str]:
        """Return fingerprints of the model and the corpus, and the adapters' settings."""
        lora = self.run.plan.lora
        return {
            "model": self.run.config.fingerprint(),
            "corpus": self.run.corpus.fingerprint,
            "adapters": "none" if lora is None else lora.text(),
        }

    def _frozen(self, placed: PlacedModel) -> dict[str, str]:
        """Return a digest of the frozen weights, which checkpoints of adapters do not contain."""
        if self.run.plan.lora is None:
            return {}
        self.member.progress(0, "digest of the frozen weights")
        return {"frozen weights": frozen_digest(placed.model, placed.parts, self.ranks)}

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
        """Return the contents of ``run.json``, for `export` and for human readers."""
        return {
            "moescale": __version__,
            "model": str(self.run.folder.resolve()),
            "data": str(self.request.data.resolve()),
            "ignore_config_field": self.request.ignore_config_field,
            "backends": asdict(self.backends),
            "settings": asdict(self.settings),
            "plan": asdict(self.run.plan),
            **({"errors_in_fp8": self.errors_in_fp8} if self.errors_in_fp8 else {}),
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
        """Load or initialize the weights that a run starts from, and print a line that says which."""
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
        self.errors_in_fp8 = placed.errors_in_fp8(self.ranks)
        if self.errors_in_fp8 and self.ranks.is_first:
            errors = ", ".join(f"{kind} {error:.2%}" for kind, error in self.errors_in_fp8.items())
            say(f"frozen weights in fp8: they differ by {errors}", sys.stderr)

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
        warn(text, self.ranks)


def _steps_of_one_epoch(corpus: Corpus, plan: ParallelPlan, checkpoint: Checkpoint | None) -> int:
    """Return the number of steps until the end of the epoch, including the steps of ``checkpoint``.

    Those may have had another number of sequences per step than this plan.
    """
    done, position = 0, 0
    if checkpoint is not None:
        state = read_training_state(checkpoint)
        done, position = state["step"], state["source"]["position"]
    return max(1, done + max(0, corpus.num_sequences - position) // plan.sequences_per_step)


def warn(text: str, ranks: Ranks) -> None:
    if ranks.is_first:
        say(printable(f"warning: {text}"), sys.stderr)
