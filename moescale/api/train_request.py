"""The request of a training run, and its arguments for ``moescale run``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from moescale.errors import ConfigError, nearest
from moescale.kernels.backends import AttentionBackend, ExpertsBackend
from moescale.report.registry import DEFAULT, DEFAULT_OBSERVERS, OBSERVERS, expand_default
from moescale.runtime.settings import TrainSettings

MAX_HANG_SECONDS = 86_400


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """Model, data, output and execution of a run."""

    model: str
    """Preset name, local folder or hub name of a Hugging Face model of a known family."""
    data: Path
    """Corpus written by `moescale prepare`, or by datasets.save_to_disk with an input_ids column."""
    output: Path
    """Folder of the run: checkpoints, metrics, TensorBoard."""
    ignore_config_field: tuple[str, ...] = ()
    """An unknown field of config.json that does not change the model; repeatable."""
    plan: Path | None = None
    """Plan written by `moescale compile`; default: one device, with the next three options."""
    tokens_per_step: int | None = None
    """Without a plan: tokens of one optimizer step."""
    micro_batch_sequences: int | None = None
    """Without a plan: sequences of a micro-batch."""
    precision: Literal["bf16", "fp32", "fp8"] | None = None
    """Without a plan: compute dtype; default: bf16 on a GPU, fp32 on the CPU; fp8: bf16 with GEMMs in fp8."""
    lora: str | None = None
    """Train adapters only, as in rank=16,alpha=32,targets=attention+experts; targets: all, attention, dense, shared,
    experts, or a module such as q_proj; also dropout=0.05, rank_stabilised=true, base=fp8 (frozen weights in fp8).
    With a plan, the plan decides."""
    adapter: Path | None = None
    """Folder of adapters to start from, of PEFT 0.19.1 and later or with matrices for every expert. It determines their
    settings, unless the plan or --lora does."""
    initialize: Literal["auto", "pretrained", "random"] = "auto"
    """Weights to start from: those of the model's folder, or random; auto: pretrained if the folder has any."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto: a GPU, or the CPU without a GPU if the plan is for one device."""
    resume: Literal["last", "last-good", "never"] = "last"
    """Continue from the newest checkpoint in output; last-good: skip damaged ones; never: refuse if there are any."""
    compile: bool | None = None
    """Compile the layers with torch.compile; default: on a GPU."""
    experts_backend: ExpertsBackend = "auto"
    """Backend of the experts' GEMMs; auto: the fastest that can run. MOESCALE_EXPERTS in the environment overrides."""
    attention_backend: AttentionBackend = "auto"
    """Backend of attention; auto: the fastest that can run. MOESCALE_ATTENTION in the environment overrides."""
    observers: tuple[str, ...] = field(
        default=DEFAULT_OBSERVERS,
        metadata={
            "help": f"Observers that display the run or store its metrics: {', '.join(OBSERVERS)}, or module:class of "
            f"your own; repeatable. `{DEFAULT}` stands for the default ones, as in --observers default --observers "
            "wandb."
        },
    )
    """Names of :data:`moescale.report.registry.OBSERVERS`, or ``module:class``."""
    check_machine: bool = True
    """Refuse to start if GPU memory or packages are insufficient for this run; otherwise only warn."""
    hang_seconds: float = 600.0
    """On several ranks: abort after this many seconds without progress; the error names the rank that hangs."""
    profile: int = 0
    """Number of steps to profile after the first few: writes a trace, a memory snapshot and a table of kernels compared
    with the plan to the folder profile of output."""
    deterministic: bool = False
    """Use deterministic algorithms, for bit-identical results, where faster ones are not."""

    def __post_init__(self) -> None:
        for name in ("data", "output", "plan", "adapter"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, Path(value))
        object.__setattr__(self, "observers", expand_default(self.observers))
        for name in ("tokens_per_step", "micro_batch_sequences"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"run.{name} ({value}) must be positive; leave it out for the default")
        if not 1 <= self.hang_seconds <= MAX_HANG_SECONDS:
            raise ConfigError(
                f"run.hang_seconds ({self.hang_seconds}) must be between 1 and {MAX_HANG_SECONDS} (a day); leave it "
                "out for ten minutes"
            )
        if self.profile < 0:
            raise ConfigError(f"run.profile ({self.profile}) must not be negative; 0 profiles nothing")
        for name, known in (
            ("precision", ("bf16", "fp32", "fp8", None)),
            ("initialize", ("auto", "pretrained", "random")),
            ("resume", ("last", "last-good", "never")),
            ("experts_backend", get_args(ExpertsBackend)),
            ("attention_backend", get_args(AttentionBackend)),
        ):
            value = getattr(self, name)
            if value not in known:
                names = [str(choice) for choice in known]
                raise ConfigError(
                    f"run.{name} ({value!r}) must be one of {', '.join(names)}{nearest(str(value), names)}"
                )


@dataclass(frozen=True, kw_only=True)
class TrainRequest(RunInputs):
    """A complete training run, the argument of :func:`moescale.train`."""

    settings: TrainSettings = field(default_factory=TrainSettings)
    """Settings of optimization, validation and checkpoints."""


def request_arguments(request: TrainRequest) -> list[str]:
    """Return the arguments of ``moescale`` for the same run."""
    return ["run", *_arguments(request)]


def _arguments(record: Any) -> Iterator[str]:
    """Yield options for the fields of ``record``, and of records in it, that differ from their defaults."""
    for item in fields(record):
        value = getattr(record, item.name)
        option = item.name.replace("_", "-")
        if is_dataclass(value):
            yield from _arguments(value)
        elif value == item.default:
            continue
        elif isinstance(value, bool):
            yield f"--{option}" if value else f"--no-{option}"
        elif isinstance(value, tuple):
            yield from (f"--{option}={part}" for part in value) if value else (f"--empty-{option}",)
        else:
            yield f"--{option}={value}"
