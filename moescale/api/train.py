"""Training as a function: takes a request, returns a summary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from moescale.api.open_run import OpenRun, open_run
from moescale.api.train_rank import SUMMARY_FILE, TrainRank, warn
from moescale.api.train_request import TrainRequest, request_arguments
from moescale.api.vocabulary import vocabulary_notice
from moescale.data.corpus import Verification, open_corpus
from moescale.errors import CheckpointError, ConfigError, MoescaleError
from moescale.kernels.backends import BackendSettings, default_backends
from moescale.records import FileKind, build, read_json_object
from moescale.report.metrics import TrainSummary
from moescale.report.observer import Observer
from moescale.runtime.checkpoint_state import DamagedCheckpointError
from moescale.runtime.checkpoint_store import CheckpointStore
from moescale.runtime.device import deterministic_algorithms
from moescale.runtime.hooks import TrainerHook
from moescale.runtime.join import Membership, join_ranks, was_launched
from moescale.runtime.judge import first_line
from moescale.runtime.launch import run_local_ranks
from moescale.runtime.output_lock import hold_output
from moescale.runtime.ranks import place_on_host

_SUMMARY = FileKind(noun="a run's summary", error=MoescaleError)


class LocalRanksError(MoescaleError):
    """A process started by the run has failed, after printing the reason; ``exit_status`` is that of the run."""

    def __init__(self, exit_status: int, logs: Path) -> None:
        super().__init__(f"the run's processes ended with status {exit_status}; the reason is above, or in {logs}")
        self.exit_status = exit_status


def train(
    request: TrainRequest, *, observers: Sequence[Observer] = (), hooks: Sequence[TrainerHook] = ()
) -> TrainSummary:
    """Train a model: start the run, or continue the one in ``request.output``.

    A process started by torchrun is one rank of the run, and returns when all ranks are done. Otherwise a plan for one
    device runs in this process, and a plan for several devices starts a process ``moescale run`` for each.

    Args:
        observers: observers in addition to those named in ``request.observers``, on the first rank.
        hooks: called during training on every rank.

    Returns:
        The summary of the run, the same on every rank.

    Raises:
        ConfigError: model, corpus, plan, settings and devices do not fit together.
        CheckpointError: the weights or the checkpoint to start from cannot be used.
        NonFiniteLossError: loss or weights became NaN or infinite.
        Preempted: stopped by SIGTERM or Ctrl-C; the state is saved, and the same call continues.
        RankFailure: another rank failed or hangs.
        LocalRanksError: a process started by this one has failed.
    """
    run = open_run(request, observers, hooks)
    plan = run.plan
    if plan.runtime_gpus > 1 and not was_launched():
        return _train_on_local_ranks(run)
    algorithms = deterministic_algorithms() if request.deterministic else nullcontext()
    with algorithms, join_ranks(run.device, hang_seconds=request.hang_seconds) as member:
        with hold_output(request.output, member.ranks), _verifying(run, member) as verification:
            with _advising(request), _chosen_backends(request, member) as backends:
                return TrainRank(run, member, verification, backends).train()


def _train_on_local_ranks(run: OpenRun) -> TrainSummary:
    request = run.request
    if run.own_observers or run.hooks:
        given = "observers" if run.own_observers else "hooks"
        raise ConfigError(
            f"train was given {given}, which the {run.plan.runtime_gpus} processes of the plan cannot be given; start "
            "this script with torchrun, or name observers as module:class in run.observers"
        )
    with hold_output(request.output):
        pass  # raises if the folder is in use, before the ranks write to the other run's logs
    logs = request.output / "logs"
    status = run_local_ranks(run.plan.runtime_gpus, request_arguments(request), logs)
    if status:
        raise LocalRanksError(status, logs)
    path = request.output / SUMMARY_FILE
    return build(TrainSummary, read_json_object(path, _SUMMARY), str(path), _SUMMARY)


@contextmanager
def _advising(request: TrainRequest) -> Iterator[None]:
    """Add remedies to errors of host memory and damaged checkpoints."""
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
        # Without the newest one, which has just been tried.
        others = CheckpointStore(request.output / "checkpoints", keep=1).list()[:-1]
        if request.resume == "last" and others:
            advice = "pass --resume last-good to go on from the newest whole one"
        else:
            advice = "bring it back from a copy, or start anew with another --output"
        raise CheckpointError(f"{error}; {advice}") from error


@contextmanager
def _chosen_backends(request: TrainRequest, member: Membership) -> Iterator[BackendSettings]:
    """Select the kernels' backends by the request, or by environment variables, with a notice."""
    asked = BackendSettings(experts=request.experts_backend, attention=request.attention_backend)
    chosen, notices = asked.overridden_by_environment()
    for notice in notices:
        warn(notice, member.ranks)
    with default_backends(chosen):
        yield chosen


@contextmanager
def _verifying(run: OpenRun, member: Membership) -> Iterator[Verification]:
    """Start verifying the run's corpus and its validation split; small ones are verified before the block begins."""
    vocabulary = vocabulary_notice(run.request.data, run.config, run.folder) if member.ranks.is_first else None
    for notice in [*run.corpus.notices, *([vocabulary] if vocabulary else [])]:
        warn(notice, member.ranks)
    validation = open_corpus(run.request.data, split="validation", missing_ok=True)
    part, num_parts = place_on_host()
    with Verification(
        [run.corpus] if validation is None else [run.corpus, validation],
        part=part,
        num_parts=num_parts,
        on_progress=lambda: member.progress(0, "verifying the corpus"),
    ) as verification:
        yield verification
