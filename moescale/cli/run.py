"""``moescale run``: train a model by a plan."""

from __future__ import annotations

import json as json_module
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter

from moescale import __version__
from moescale.config import ModelConfig
from moescale.convert.checkpoint import kept_tensors
from moescale.convert.hf_config import PRESETS, read_model_config, resolve_model
from moescale.convert.weight_files import has_weights
from moescale.data.corpus import Corpus, Verification, open_corpus
from moescale.data.loader import Loader, validation_batches
from moescale.errors import CheckpointError, ConfigError, printable
from moescale.files import write_atomically
from moescale.models.flops import flops_per_token, peak_flops
from moescale.plan import ParallelPlan, load_plan, one_device_plan
from moescale.report.metrics import Observer, SilentObserver, TrainSummary, to_json
from moescale.report.run_log import RunLog
from moescale.runtime.checkpoint import Checkpoint, CheckpointStore, DamagedCheckpointError, read_training_state
from moescale.runtime.device import choose_device, make_deterministic
from moescale.runtime.launch import Membership, join_ranks, run_local_ranks, was_launched
from moescale.runtime.mapping import compile_layers, optimizer_format
from moescale.runtime.output_lock import hold_output
from moescale.runtime.ranks import Ranks, place_on_host
from moescale.runtime.session import PlacedModel, place_model
from moescale.runtime.settings import TrainSettings
from moescale.runtime.train import Trainer
from moescale.runtime.watchdog import first_line

RUN_FILE = "run.json"
MAX_HANG_SECONDS = 86_400
MIN_CPU_RANKS = 16
CPU_RANKS_PER_CORE = 4
"""Ranks on a CPU are for trying a plan out; more of them only take one another's memory."""


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """What is trained, on what, and where it goes."""

    model: str
    """Preset name, local folder or hub name of a Hugging Face DeepSeek-V2, DeepSeek-V3 or Qwen3-MoE model."""
    data: Path
    """Corpus written by `moescale prepare`, or by datasets.save_to_disk with an input_ids column."""
    output: Path
    """Folder of the run: checkpoints, metrics, TensorBoard."""
    ignore_config_field: tuple[str, ...] = ()
    """A field of config.json that is not known and does not change the model; repeatable."""
    plan: Path | None = None
    """Plan written by `moescale compile`; default: one device, as the next three options say."""
    tokens_per_step: int | None = None
    """Without a plan: tokens of one optimizer step."""
    micro_batch_sequences: int | None = None
    """Without a plan: sequences that go through the model at once."""
    precision: Literal["bf16", "fp32"] | None = None
    """Without a plan: compute dtype; default: bf16 on a GPU, fp32 on the CPU."""
    initialize: Literal["auto", "pretrained", "random"] = "auto"
    """Weights to start from: those of the model's folder, or random; auto: pretrained where the folder has any."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto: a GPU, or the CPU where there is none and the plan is for one device."""
    resume: Literal["last", "last-good", "never"] = "last"
    """Continue from the newest checkpoint in output; last-good: skip damaged ones; never: refuse if there are any."""
    compile: bool | None = None
    """Compile the layers with torch.compile; default: on a GPU."""
    hang_seconds: float = 600.0
    """On several ranks: seconds without progress after which the run ends, naming the rank that hangs."""
    deterministic: bool = False
    """Ask for bit-identical results where an operator has a faster way that is not."""

    def __post_init__(self) -> None:
        for name in ("tokens_per_step", "micro_batch_sequences"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"run.{name} ({value}) must be positive; leave it out for the default")
        if not 1 <= self.hang_seconds <= MAX_HANG_SECONDS:
            raise ConfigError(
                f"run.hang_seconds ({self.hang_seconds}) must be between 1 and {MAX_HANG_SECONDS} (a day); leave it "
                "out for ten minutes"
            )


def run_command(
    inputs: Annotated[RunInputs, Parameter(name="*")],
    settings: Annotated[TrainSettings, Parameter(name="*")] = TrainSettings(),  # noqa: B008 - frozen
    *,
    json: bool = False,
) -> None:
    """Train a model: start it, or continue the run in the output folder.

    Parameters
    ----------
    json
        Print the summary as JSON on standard output, without a progress bar.
    """
    folder = resolve_model(inputs.model)
    config = read_model_config(folder, inputs.ignore_config_field)
    corpus = open_corpus(inputs.data)
    device = choose_device(inputs.device)
    plan = _plan(inputs, config, corpus, device)
    _check_corpus(config, corpus, plan)
    _check_devices(inputs, plan, device)
    if plan.runtime_gpus > 1 and not was_launched():
        with hold_output(inputs.output):
            pass  # in use: refused here already, before the ranks write to the other run's logs
        raise SystemExit(run_local_ranks(plan.runtime_gpus, sys.argv[1:], inputs.output / "logs"))
    if inputs.deterministic:
        make_deterministic()
    with join_ranks(device, hang_seconds=inputs.hang_seconds) as member:
        with hold_output(inputs.output, member.ranks), _verifying(inputs, corpus, member) as verification:
            try:
                summary = _train(
                    inputs, settings, folder, config, corpus, verification, plan, member, show_progress=not json
                )
            except (RuntimeError, MemoryError) as error:
                if not isinstance(error, MemoryError) and "DefaultCPUAllocator" not in str(error):
                    raise
                raise ConfigError(
                    f"host memory is exhausted ({first_line(str(error))}); give the run more of it, or a smaller model "
                    "or micro-batch"
                ) from error
            except DamagedCheckpointError as error:
                raise CheckpointError(f"{error}; {_help_with_damage(inputs)}") from error
    if json and member.ranks.is_first:
        print(to_json(asdict(summary), indent=2))


def _help_with_damage(inputs: RunInputs) -> str:
    """What to do about a checkpoint that cannot be loaded; not what has just been tried."""
    others = CheckpointStore(inputs.output / "checkpoints", keep=1).list()[:-1]
    if inputs.resume == "last" and others:
        return "pass --resume last-good to go on from the newest whole one"
    return "bring it back from a copy, or start anew with another --output"


def _check_devices(inputs: RunInputs, plan: ParallelPlan, device: torch.device) -> None:
    if plan.runtime_gpus == 1:
        return
    if inputs.device == "auto" and device.type == "cpu":
        raise ConfigError(
            f"plan.runtime_gpus ({plan.runtime_gpus}) needs GPUs, and torch sees none here; pass --device cpu if the "
            "plan is to run on as many CPU processes"
        )
    most = max(MIN_CPU_RANKS, CPU_RANKS_PER_CORE * (os.cpu_count() or 1))
    if device.type == "cpu" and not was_launched() and plan.runtime_gpus > most:
        raise ConfigError(
            f"plan.runtime_gpus ({plan.runtime_gpus}) exceeds the {most} processes that --device cpu starts on this "
            "machine's cores; start them on several machines with torchrun, or compile a plan for fewer"
        )
    if device.type == "cuda" and not was_launched() and torch.cuda.device_count() < plan.runtime_gpus:
        raise ConfigError(
            f"plan.runtime_gpus ({plan.runtime_gpus}) exceeds this machine's {torch.cuda.device_count()} GPUs; start "
            "it on all machines with torchrun, or compile a plan for fewer"
        )


def _train(
    inputs: RunInputs,
    settings: TrainSettings,
    folder: Path,
    config: ModelConfig,
    corpus: Corpus,
    verification: Verification,
    plan: ParallelPlan,
    member: Membership,
    *,
    show_progress: bool,
) -> TrainSummary:
    """One rank's part of the run; only the first one shows and writes what is written once."""
    ranks, device = member.ranks, member.device
    member.progress(0, "building the model")
    if device.type == "cuda":
        warning = memory_warning(plan, torch.cuda.get_device_properties(device).total_memory)
        if warning is not None:
            _warn(warning, ranks)
    store = CheckpointStore(inputs.output / "checkpoints", settings.keep_checkpoints)
    checkpoint = _checkpoint_to_resume(store, inputs.resume, member)
    placed = place_model(config, plan, ranks, device)
    if inputs.compile or (inputs.compile is None and device.type == "cuda"):
        compile_layers(placed.model)
    if checkpoint is None:
        _fill(placed, folder, inputs, settings, member)
    total_steps = settings.steps or _steps_of_one_epoch(corpus, plan, checkpoint)
    source = Loader(
        corpus,
        sequences_per_step=plan.sequences_per_step,
        micro_batch_sequences=plan.micro_batch_sequences,
        seed=settings.seed,
        rank=ranks.rank,
        world_size=ranks.size,
        verification=verification,
    )
    with ExitStack() as stack:
        observer: Observer = SilentObserver()
        log = None
        if ranks.is_first:
            inputs.output.mkdir(parents=True, exist_ok=True)
            log = RunLog(
                inputs.output,
                total_steps=total_steps,
                flops_per_token=flops_per_token(config, plan.sequence_length),
                peak_flops=(peak_flops(device) or 0) * ranks.size or None,
                show_progress=show_progress,
            )
            observer = stack.enter_context(log)
        trainer = Trainer(
            model=placed.model,
            settings=settings,
            total_steps=total_steps,
            source=source,
            store=store,
            observer=observer,
            optimizer_format=optimizer_format(plan),
            validation=_validation(inputs.data, settings, plan, ranks),
            identity={"model": config.fingerprint(), "corpus": corpus.fingerprint},
            ranks=ranks,
            parts=placed.parts,
            plan=json_module.loads(plan.to_json()),
            on_progress=member.progress,
            on_notice=lambda text: _warn(text, ranks),
        )
        if checkpoint is not None:
            for path in trainer.resume(checkpoint):
                _warn(
                    f"a checkpoint after step {trainer.step} was moved to {path}; delete it when it is not needed",
                    ranks,
                )
        if ranks.is_first:
            _write_run_file(inputs, folder, plan, settings)
        try:
            summary = trainer.train()
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(plan, device, trainer.step) from error
        verification.check()
        if not verification.is_done:
            share = verification.verified_bytes / max(1, verification.num_bytes)
            _warn(f"the run ended before its corpus was verified: {share:.0%} of {inputs.data} was", ranks)
        if log is not None:
            log.finish(summary)
    return summary


@contextmanager
def _verifying(inputs: RunInputs, corpus: Corpus, member: Membership) -> Iterator[Verification]:
    """Begin to verify the run's corpus and its validation split; a small one is verified when the block begins."""
    for notice in corpus.notices:
        _warn(notice, member.ranks)
    validation = open_corpus(inputs.data, split="validation", missing_ok=True)
    part, num_parts = place_on_host()
    with Verification(
        [corpus] if validation is None else [corpus, validation],
        part=part,
        num_parts=num_parts,
        on_progress=lambda: member.progress(0, "verifying the corpus"),
    ) as verification:
        yield verification


def _steps_of_one_epoch(corpus: Corpus, plan: ParallelPlan, checkpoint: Checkpoint | None) -> int:
    """Steps in all until the rest of the epoch holds no further whole step; those of ``checkpoint`` are done.

    They may have taken other numbers of sequences than this plan does.
    """
    done, position = 0, 0
    if checkpoint is not None:
        state = read_training_state(checkpoint)
        done, position = state["step"], state["source"]["position"]
    return max(1, done + max(0, corpus.num_sequences - position) // plan.sequences_per_step)


def _out_of_memory(plan: ParallelPlan, device: torch.device, step: int) -> ConfigError:
    """Planned against actual memory, and what to try."""
    peak = torch.cuda.max_memory_allocated(device)
    text = f"step {step + 1}: out of memory on {device}, {peak / 2**30:.1f} GiB allocated at the peak"
    if plan.prediction is not None:
        classes = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in plan.prediction.breakdown_bytes.items())
        text += f"; the plan predicted {plan.prediction.peak_bytes / 2**30:.1f} GiB on the GPU ({classes})"
    device_bytes = torch.cuda.get_device_properties(device).total_memory
    pin = ", or --pin micro_batch_sequences=1" if plan.micro_batch_sequences > 1 else ""
    return ConfigError(f"{text}. Compile with --memory-limit {lower_limit_gib(plan, device_bytes)}{pin}")


def lower_limit_gib(plan: ParallelPlan, device_bytes: int) -> int:
    """The --memory-limit to compile with after ``plan`` ran out of memory: always one that rules this plan out.

    By a twentieth of the GPU below what was predicted, so that compiling and running again comes to an end.
    """
    predicted = device_bytes if plan.prediction is None else min(plan.prediction.peak_bytes, device_bytes)
    return max(1, math.floor((predicted - 0.05 * device_bytes) / 2**30))


def _plan(inputs: RunInputs, config: ModelConfig, corpus: Corpus, device: torch.device) -> ParallelPlan:
    by_hand: dict[str, int | str | None] = {
        "tokens_per_step": inputs.tokens_per_step,
        "micro_batch_sequences": inputs.micro_batch_sequences,
        "precision": inputs.precision,
    }
    given = [name for name, value in by_hand.items() if value is not None]
    if inputs.plan is not None:
        if given:
            raise ConfigError(f"run.{given[0]} ({by_hand[given[0]]}) is decided by the plan {inputs.plan}; drop one")
        plan = load_plan(inputs.plan)
        _check_version(plan, inputs.plan)
        plan.check_model(config)
        return plan
    sequences = inputs.micro_batch_sequences or 1
    tokens_per_step = inputs.tokens_per_step or sequences * corpus.sequence_length
    micro_batch_tokens = sequences * corpus.sequence_length
    if tokens_per_step <= 0 or tokens_per_step % micro_batch_tokens:
        raise ConfigError(
            f"run.tokens_per_step ({tokens_per_step}) must be a multiple of {micro_batch_tokens}: "
            f"run.micro_batch_sequences ({sequences}) sequences of {corpus.sequence_length} tokens"
        )
    return one_device_plan(
        config,
        sequence_length=corpus.sequence_length,
        micro_batch_sequences=sequences,
        gradient_accumulation_steps=tokens_per_step // micro_batch_tokens,
        compute_dtype=inputs.precision or ("bf16" if device.type == "cuda" else "fp32"),
    )


def _check_version(plan: ParallelPlan, path: Path) -> None:
    if plan.moescale_version != __version__:
        raise ConfigError(
            f"{path}: plan.moescale_version ({plan.moescale_version}) must be this version's ({__version__}): what a "
            "plan decides, and its predictions, hold for the runtime it was made for; compile it again"
        )


def memory_warning(plan: ParallelPlan, device_bytes: int) -> str | None:
    """What to say of a plan that expects more memory than the GPU has, such as one made for another cluster."""
    if plan.prediction is None or plan.prediction.peak_bytes <= device_bytes:
        return None
    return (
        f"the plan predicts {plan.prediction.peak_bytes / 2**30:.1f} GiB on a GPU, this one has "
        f"{device_bytes / 2**30:.1f} GiB; compile for this cluster, or with --memory-limit "
        f"{0.95 * device_bytes / 2**30:.0f}"
    )


def _check_corpus(config: ModelConfig, corpus: Corpus, plan: ParallelPlan) -> None:
    if corpus.sequence_length != plan.sequence_length:
        raise ConfigError(
            f"plan.sequence_length ({plan.sequence_length}) must equal the corpus's ({corpus.sequence_length}); "
            "prepare the corpus or compile the plan again"
        )
    if corpus.vocabulary_size > config.vocab_size:
        raise ConfigError(
            f"the corpus has token ids up to {corpus.vocabulary_size - 1}, model.vocab_size is {config.vocab_size}; "
            "prepare the corpus with the model's own tokenizer"
        )
    if plan.sequence_length > config.max_sequence_length:
        raise ConfigError(
            f"plan.sequence_length ({plan.sequence_length}) must not exceed model.max_sequence_length "
            f"({config.max_sequence_length})"
        )


def _warn(text: str, ranks: Ranks) -> None:
    if ranks.is_first:
        print(printable(f"warning: {text}"), file=sys.stderr, flush=True)


def _checkpoint_to_resume(store: CheckpointStore, resume: str, member: Membership) -> Checkpoint | None:
    if resume == "last-good":
        return store.last_good(
            member.ranks,
            on_skip=lambda problem: _warn(f"skipped a damaged checkpoint: {problem}", member.ranks),
            on_progress=lambda: member.progress(0, "checking checkpoints"),
        )
    last = member.ranks.gather(store.last() if member.ranks.is_first else None)[0]
    if last is not None and resume == "never":
        raise CheckpointError(
            f"{last.path}: --resume never, but this output already holds a run; choose another --output"
        )
    return last


def _fill(placed: PlacedModel, folder: Path, inputs: RunInputs, settings: TrainSettings, member: Membership) -> None:
    """The weights a run starts from, and a line that says which.

    Random by itself only where nothing hints at weights: a download cut short or a folder of .bin files is an error.
    """
    fetched = inputs.model not in PRESETS and not Path(inputs.model).exists()
    pretrained = fetched or has_weights(folder) if inputs.initialize == "auto" else inputs.initialize == "pretrained"
    if member.ranks.is_first:
        source = f"from {folder}" if pretrained else f"random, seed {settings.seed}"
        print(f"weights: {source}", file=sys.stderr, flush=True)
    if pretrained:
        placed.import_weights(folder, lambda done, total: member.progress(0, "importing weights"))
        kept = kept_tensors(folder, placed.model.config)
        if kept:
            _warn(
                f"the {len(kept)} tensors for multi-token prediction in {folder} are not trained; `export` keeps them "
                "as they are",
                member.ranks,
            )
    else:
        placed.initialize(settings.seed)


def _validation(data: Path, settings: TrainSettings, plan: ParallelPlan, ranks: Ranks) -> Any:
    corpus = open_corpus(data, split="validation", missing_ok=True)
    if corpus is None:
        if settings.validation_every:
            raise ConfigError(
                f"run.validation_every ({settings.validation_every}) needs a validation split, which {data} lacks; "
                "prepare it with --validation-fraction"
            )
        return None

    def batches() -> Iterable[Any]:
        return validation_batches(
            corpus,
            micro_batch_sequences=plan.micro_batch_sequences,
            rank=ranks.rank,
            world_size=ranks.size,
            limit=settings.validation_sequences,
        )

    return batches


def _write_run_file(inputs: RunInputs, folder: Path, plan: ParallelPlan, settings: TrainSettings) -> None:
    """Leave beside the checkpoints what `export` and a reader of the run need."""
    document = {
        "moescale": __version__,
        "model": str(folder.resolve()),
        "data": str(inputs.data.resolve()),
        "ignore_config_field": inputs.ignore_config_field,
        "settings": asdict(settings),
        "plan": json_module.loads(plan.to_json()),
    }
    write_atomically(inputs.output / RUN_FILE, json_module.dumps(document, indent=2))
