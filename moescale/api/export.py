"""Export as a function: writes a run's weights as a Hugging Face checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch

from moescale.config import ModelConfig
from moescale.convert.adapter_folder import AdapterReport, export_adapter
from moescale.convert.checkpoint_export import ExportReport, export_checkpoint
from moescale.convert.folder_weights import FolderWeights
from moescale.convert.hf_config import CONFIG_FILE, read_model_config
from moescale.convert.merged_weights import MergedWeights
from moescale.convert.staged_export import check_output
from moescale.convert.stored_layout import folder_dtype
from moescale.convert.tensor_source import TensorSource
from moescale.convert.weight_files import has_weights
from moescale.errors import CheckpointError, ConfigError
from moescale.lora import LoraSettings
from moescale.models.frozen_fp8 import weights_in_fp8
from moescale.models.lora import add_adapters
from moescale.models.transformer import build_on_meta
from moescale.records import FileKind, Length, Matches, build, read_json_object
from moescale.report.progress import bytes_progress
from moescale.runtime.checkpoint import Checkpoint, read_training_state, verify
from moescale.runtime.checkpoint_state import DamagedCheckpointError
from moescale.runtime.checkpoint_store import CheckpointStore
from moescale.runtime.checkpoint_weights import CheckpointWeights
from moescale.runtime.frozen import source_digest
from moescale.runtime.session import COMPUTE_DTYPES

_ADAPTERS = FileKind(noun="a checkpoint's adapters", error=CheckpointError, root="plan.lora")
_MERGED_WITH_PLAIN = (
    "the adapters were trained on weights in fp8 and are added to the weights as the folder has them, which the run's "
    "validation loss is not of"
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Run to export, output folder and options."""

    run: Path
    """Folder of a run."""
    output: Path
    """Folder to write; must not exist."""
    step: int | None = None
    """Step of the checkpoint to export; default: the newest."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Dtype of the exported weights; default: that of the folder the run started from (or of --model), from its
    config.json or else its weights; bf16 if neither gives one."""
    model: Path | None = None
    """Folder with the config.json, tokenizer and generation files to copy; default: the one the run started from."""
    ignore_config_field: tuple[str, ...] = ()
    """An unknown field of config.json that does not change the model; repeatable; default: those that the run
    ignored."""
    max_shard_gigabytes: float = 5.0
    """Largest shard: a number of 10^9 bytes, or a size such as 4GiB."""
    merge: bool = False
    """For a run of adapters: export a full checkpoint, with the adapters merged into the base weights."""
    adapter: Literal["peft", "per-expert"] | None = None
    """For a run of adapters: export the adapters only, in the layout of PEFT 0.19.1 and later, or with separate
    matrices for every expert, as inference servers expect."""

    def __post_init__(self) -> None:
        if not 1e-9 <= self.max_shard_gigabytes < math.inf:
            raise ConfigError(
                f"export.max_shard_gigabytes ({self.max_shard_gigabytes}) must be positive and finite; "
                "leave it out for 5"
            )
        if self.merge and self.adapter is not None:
            raise ConfigError(f"export.merge and export.adapter ({self.adapter}) exclude each other; drop one of them")
        if self.adapter not in (None, "peft", "per-expert"):
            raise ConfigError(f"export.adapter ({self.adapter!r}) must be peft or per-expert")


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """The fields of ``run.json`` that an export reads; the others are for human readers."""

    model: Annotated[str, Length(least=1, most=4096), Matches(r"[^\0]+", "a path")]
    """Folder of the model that the run started from."""
    ignore_config_field: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """Summary of an export."""

    report: ExportReport | AdapterReport
    step: int
    """Step of the exported checkpoint."""
    dtype: str
    """bf16, fp16 or fp32; adapters are always fp32."""


def export(settings: ExportSettings, *, progress: bool = True) -> ExportSummary:
    """Write a run's weights as a Hugging Face checkpoint that transformers opens without remote code.

    Args:
        progress: draw a progress bar on standard error.

    Raises:
        CheckpointError: the run has no intact checkpoint of that step, or the output exists.
        ConfigError: the folder with configuration and tokenizer does not match the weights.
    """
    check_output(settings.output)
    reference, ignored_fields = _reference(settings)
    ignored_fields = settings.ignore_config_field or ignored_fields
    config = read_model_config(reference, ignored_fields)
    names = {dtype: name for name, dtype in DTYPES.items()}
    dtype_name: str = settings.dtype or names[folder_dtype(reference)]
    store = CheckpointStore(settings.run / "checkpoints", keep=1)
    checkpoint = store.last() if settings.step is None else store.at(settings.step)
    if checkpoint is None:
        raise CheckpointError(f"{store.folder}: holds no whole checkpoint; let the run save one first")
    try:
        _check_model(settings, reference, config, checkpoint)
        lora = _check_adapters(settings, checkpoint)
        with CheckpointWeights(checkpoint) as source, bytes_progress("exporting", show=progress) as on_progress:
            if lora is not None and settings.adapter is not None:
                written = export_adapter(
                    config, lora, source, settings.output, layout=settings.adapter, base_model=str(reference)
                )
                return ExportSummary(report=written, step=checkpoint.step, dtype="fp32")
            weights: TensorSource = source
            if lora is not None:
                weights = _merged(source, checkpoint, reference, config, lora)
            report = export_checkpoint(
                config,
                weights,
                settings.output,
                reference=reference,
                ignored_fields=ignored_fields,
                dtype=DTYPES[dtype_name],
                max_shard_bytes=int(settings.max_shard_gigabytes * 1e9),
                on_progress=on_progress,
            )
            if lora is not None and lora.base == "fp8":
                report = replace(report, warnings=(*report.warnings, _MERGED_WITH_PLAIN))
    except DamagedCheckpointError as error:
        raise _with_remedy(error, store, checkpoint) from error
    return ExportSummary(report=report, step=checkpoint.step, dtype=dtype_name)


def _check_adapters(settings: ExportSettings, checkpoint: Checkpoint) -> LoraSettings | None:
    """Return the settings of a checkpoint's adapters, None for full weights. Raises ConfigError for wrong options."""
    plan = read_training_state(checkpoint)["plan"] or {}
    if plan.get("lora") is None:
        if settings.merge or settings.adapter is not None:
            option = "merge" if settings.merge else f"adapter {settings.adapter}"
            raise ConfigError(f"{checkpoint.path}: holds whole weights and no adapters; drop --{option}")
        return None
    if not settings.merge and settings.adapter is None:
        raise ConfigError(
            f"{checkpoint.path}: holds adapters; give --merge for a whole checkpoint, or --adapter peft or --adapter "
            "per-expert for the adapters alone"
        )
    return build(LoraSettings, plan["lora"], str(checkpoint.path), _ADAPTERS)


def _merged(
    source: CheckpointWeights, checkpoint: Checkpoint, reference: Path, config: ModelConfig, lora: LoraSettings
) -> MergedWeights:
    """Return base weights merged with adapters, after checking that the adapters were trained on these weights."""
    if not has_weights(reference):
        raise CheckpointError(
            f"{reference}: has no weights to merge with: the run started from random ones, which are on no disk. "
            "Export the adapters alone with --adapter"
        )
    state = read_training_state(checkpoint)
    dtype = COMPUTE_DTYPES[state["plan"]["compute_dtype"]]
    base = FolderWeights(reference, config, dtype)
    model = build_on_meta(config, dtype)
    add_adapters(model, lora)
    digest, trained = source_digest(base, weights_in_fp8(model)), state["identity"].get("frozen weights")
    if digest != trained:
        raise CheckpointError(
            f"{reference}: holds weights with digest {digest}, {checkpoint.path} was trained on those with {trained}; "
            "give the folder of these as --model"
        )
    return MergedWeights(base, source, config, lora)


def _with_remedy(error: DamagedCheckpointError, store: CheckpointStore, checkpoint: Checkpoint) -> CheckpointError:
    if not checkpoint.path.exists():
        return CheckpointError(
            f"{checkpoint.path}: the run has removed step {checkpoint.step} meanwhile; export again, or let the run "
            "keep more with --keep-checkpoints"
        )
    for other in reversed(store.list()):
        if other.step == checkpoint.step:
            continue
        try:
            verify(other)
        except CheckpointError:
            continue
        return CheckpointError(f"{error}; export the newest whole one with --step {other.step}")
    return CheckpointError(f"{error}; the run has no other whole one, bring it back from a copy")


def _check_model(settings: ExportSettings, reference: Path, config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raise ConfigError if the configuration is not the one of the training, even if all shapes are equal."""
    trained = read_training_state(checkpoint)["identity"].get("model")
    if trained in (None, config.fingerprint()):
        return
    remedy = (
        "leave --model out, or give a folder whose config.json is the one that was trained"
        if settings.model is not None
        else "it was changed since; bring it back, or give a copy of the one that was trained as --model"
    )
    raise ConfigError(
        f"{reference / CONFIG_FILE}: describes a model with fingerprint {config.fingerprint()}, {checkpoint.path} was "
        f"trained as {trained}: a field such as top_k or rope_theta differs; {remedy}"
    )


def _reference(settings: ExportSettings) -> tuple[Path, tuple[str, ...]]:
    """Return the folder with configuration and tokenizer, and the fields of its config.json to ignore."""
    if settings.model is not None:
        if not settings.model.is_dir():
            raise ConfigError(
                f"export.model ({settings.model}) is not a folder; give one with the config.json to copy, "
                "or leave --model out to take the one the run started from"
            )
        return settings.model, ()
    run_file = settings.run / "run.json"
    kind = FileKind(
        noun="a run's file",
        error=CheckpointError,
        missing=f"missing; --run ({settings.run}) must be the output folder of `moescale run`. Without this file, give "
        "the folder of the run's model as --model",
        remedy="the model's folder is therefore not known: give it as --model",
        ignores_unknown=True,
    )
    record = build(RunFile, read_json_object(run_file, kind), str(run_file), kind)
    reference = Path(record.model)
    if not reference.is_dir():
        raise CheckpointError(f"{reference}: gone, {run_file} says the run started from it; give its copy as --model")
    return reference, record.ignore_config_field
