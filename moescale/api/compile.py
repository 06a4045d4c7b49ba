"""Planning as a function: takes settings, returns a plan with its explanation. Imports no torch."""

from __future__ import annotations

import math
import re
from pathlib import Path

from moescale.api.compile_settings import CompileSettings
from moescale.api.vocabulary import check_vocabulary, vocabulary_notice
from moescale.config import ModelConfig
from moescale.convert.hf_config import read_model_config, resolve_model
from moescale.data.corpus.manifest import MANIFEST, read_manifest
from moescale.errors import ConfigError
from moescale.files import check_can_be_written, write_atomically
from moescale.lora import parse_lora
from moescale.plan import save_plan
from moescale.planner.cluster import Cluster, load_cluster
from moescale.planner.explain import explain_html
from moescale.planner.fit import FitResult, fit_to_gpus
from moescale.planner.request import PlanRequest
from moescale.planner.result import PlanResult
from moescale.planner.search import compile_plan

DEFAULT_SEQUENCE_LENGTH = 2048


def compile(settings: CompileSettings) -> PlanResult:
    """Plan training for a cluster, and write the plan and its explanation to the files named in ``settings``.

    Returns:
        The search and its best plan: ``result.plan()`` is the plan. It raises ConfigError if none fits; no plan was
        written then. :mod:`moescale.planner.explain` renders the result.

    Raises:
        ConfigError: the model or cluster cannot be read, a setting breaks a rule, or a file cannot be written.
    """
    _check_files(settings)
    result = compile_plan(*_read(settings))
    if settings.output is not None and result.best is not None:
        save_plan(result.plan(), settings.output)
    if settings.html is not None:
        _write_page(explain_html(result), settings.html)
    return result


def fit(settings: CompileSettings) -> FitResult:
    """Find the fewest GPUs on which training fits, and its speed from there to 1024 GPUs.

    Raises:
        ConfigError: as :func:`compile`; also if ``settings`` name files, because there is no single plan to write.
    """
    for option, path in (("--output", settings.output), ("--html", settings.html)):
        if path is not None:
            raise ConfigError(
                f"{option} ({path}) cannot be written with --fit, which makes a table and not one plan; drop one of "
                "the two (with --json the table goes to standard output)"
            )
    return fit_to_gpus(*_read(settings))


def _read(settings: CompileSettings) -> tuple[ModelConfig, Cluster, PlanRequest]:
    config = read_model_config(resolve_model(settings.model, config_only=True), settings.ignore_config_field)
    if settings.data is not None:
        _check_is_no_saved_dataset(settings.data)
        check_vocabulary(read_manifest(settings.data).vocabulary_size, config)
    return config, load_cluster(settings.cluster), _request(settings)


def corpus_notice(settings: CompileSettings) -> str | None:
    """Return what a user should know of the corpus that ``settings`` name and their model, or None."""
    if settings.data is None:
        return None
    folder = resolve_model(settings.model, config_only=True)
    return vocabulary_notice(settings.data, read_model_config(folder, settings.ignore_config_field), folder)


def _sequence_length(settings: CompileSettings) -> int:
    if settings.data is None:
        return DEFAULT_SEQUENCE_LENGTH if settings.sequence_length is None else settings.sequence_length
    length = read_manifest(settings.data).sequence_length
    if settings.sequence_length not in (None, length):
        raise ConfigError(
            f"compile.sequence_length ({settings.sequence_length}) must be that of compile.data ({settings.data}), "
            f"{length}; leave one of the two out"
        )
    return length


def _check_is_no_saved_dataset(data: Path) -> None:
    """Raise ConfigError for a folder of ``datasets.save_to_disk``: it records no lengths, and reading them is slow."""
    if not (data / MANIFEST).is_file() and any((data / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise ConfigError(
            f"compile.data ({data}) is a saved dataset, which does not record its sequence length; leave it out and "
            "give --sequence-length. `moescale run` takes the dataset as it is"
        )


def _check_files(settings: CompileSettings) -> None:
    """Raise ConfigError before planning if a file could not be written afterwards."""
    for option, path in (("--output", settings.output), ("--html", settings.html)):
        if path is not None:
            check_can_be_written(path, option)
    if settings.output is not None and settings.html is not None and settings.output == settings.html:
        raise ConfigError(f"--output and --html ({settings.html}) must be two files; give one of them another name")


def _write_page(page: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page)
    except OSError as error:
        raise ConfigError(f"--html ({path}) cannot be written: {error.strerror}; give another path") from None


def _request(settings: CompileSettings) -> PlanRequest:
    plan_gpus = None if settings.plan_gpus == "auto" else _integer(settings.plan_gpus)
    return PlanRequest(
        runtime_gpus=settings.runtime_gpus if settings.runtime_gpus is not None else plan_gpus or 1,
        plan_gpus=plan_gpus,
        tokens_per_step=settings.tokens_per_step,
        sequence_length=_sequence_length(settings),
        memory_limit_bytes=_bytes(settings.memory_limit),
        compute_dtype="bf16" if settings.precision == "fp8" else settings.precision,
        fp8_gemms=settings.precision == "fp8",
        lora=None if settings.lora is None else parse_lora(settings.lora),
        exact_weights=not settings.allow_stochastic_rounding,
        router_imbalance=settings.router_imbalance,
        allow_unsupported=settings.allow_unsupported,
        pins=_pins(settings.pin),
        forbidden=frozenset(_pair(text, "forbid") for text in settings.forbid),
    )


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"compile.plan_gpus ('{text}') must be a number of GPUs, or auto") from None


def _bytes(gibibytes: float | None) -> int | None:
    if gibibytes is None:
        return None
    if not math.isfinite(gibibytes * 2**30):
        raise ConfigError(
            f"compile.memory_limit ({gibibytes}) must be a finite number of GiB; leave it out for no limit"
        )
    return round(gibibytes * 2**30)


def _pins(texts: tuple[str, ...]) -> dict[str, str]:
    pins: dict[str, str] = {}
    for text in texts:
        name, value = _pair(text, "pin")
        if pins.get(name, value) != value:
            raise ConfigError(
                f"--pin {name}={pins[name]} and --pin {name}={value} contradict each other; a decision has one value. "
                "Keep one of them, or rule values out with --forbid"
            )
        pins[name] = value
    return pins


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise ConfigError(f"--{option} ('{text}') must have the form name=value, for example ep=4")
    return re.sub("[-.]", "_", name.strip()), value.strip().lower()
