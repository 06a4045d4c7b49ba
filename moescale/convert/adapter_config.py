"""Reads, checks and writes PEFT's adapter_config.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moescale.config import ModelConfig
from moescale.convert.adapter_layout import (
    MLP,
    AdaptedModule,
    Layout,
)
from moescale.errors import CheckpointError
from moescale.lora import LoraSettings
from moescale.models.registry import family_of
from moescale.records import FileKind, build, read_json_object, show

CONFIG_FILE = "adapter_config.json"
_FILE = FileKind(
    noun="an adapter's configuration",
    error=CheckpointError,
    missing="missing; give the folder of an adapter, with adapter_config.json and adapter_model.safetensors",
    remedy="fetch the adapter again",
    ignores_unknown=True,
)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The fields of an adapter_config.json that decide what the adapters compute."""

    peft_type: str
    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: list[str] | None = None


_DESCRIPTIVE = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "runtime_config", "qalora_group_size", "ensure_weight_tying", "fan_in_fan_out"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
"""Fields of PEFT that do not change what stored adapters compute. The names of tensors give the adapted modules, and
initialization no longer matters. ``fan_in_fan_out`` applies to a kind of layer that these models do not have."""
_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")
"""Initializations that leave the base weights unchanged. Others, such as pissa, change them in ways not stored."""


def adapter_document(
    config: ModelConfig, lora: LoraSettings, modules: list[AdaptedModule], layout: Layout, base_model: str
) -> dict:
    prefix = family_of(config).names.layer_prefix
    linear, parameters = set(), set()
    for module in modules:
        layer = module.name.split(".")[1]
        for key in module.keys:
            path = key.removeprefix(prefix.format(layer=layer))
            if module.num_experts:
                parameters |= {f"{path}.gate_up_proj", f"{path}.down_proj"}
            elif path.endswith(MLP):
                parameters.add(f"{path}.weight")
            else:
                linear.add(path)
    if layout == "per-expert":  # in which every target is a layer
        linear |= {path.removesuffix(".weight") for path in parameters if path.endswith(".weight")}
        linear |= set(MLP) if any(module.num_experts for module in modules) else set()
        parameters = set()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        # PEFT refuses dropout on adapted parameters; dropout matters in training only.
        "lora_dropout": 0.0 if parameters else lora.dropout,
        "use_rslora": lora.rank_stabilised,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(linear),
        "target_parameters": sorted(parameters) or None,
    }


def read_adapter_config(path: Path) -> AdapterConfig:
    """Read an adapter_config.json; raises CheckpointError if it is damaged or describes another kind of adapter."""
    document = read_json_object(path, _FILE)
    record = build(AdapterConfig, document, str(path), _FILE)
    _check_other_fields(document, path)
    only = {
        "peft_type": (record.peft_type, "LORA"),
        "use_dora": (record.use_dora, False),
        "bias": (record.bias, "none"),
        "rank_pattern": (record.rank_pattern or {}, {}),
        "alpha_pattern": (record.alpha_pattern or {}, {}),
        "modules_to_save": (record.modules_to_save or [], []),
    }
    for name, (value, wanted) in only.items():
        if value != wanted:
            raise CheckpointError(
                f"{path}: {name} ({show(value)}) must be {wanted}: other adapters cannot be continued"
            )
    return record


def _check_other_fields(document: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError for a field that changes what the adapters compute and is not supported."""
    known = {field.name for field in dataclasses.fields(AdapterConfig)} | _DESCRIPTIVE
    initialization = document.pop("init_lora_weights", True)
    if not any(initialization is value or initialization == value != 1 for value in _INITIALIZATIONS):
        raise CheckpointError(
            f"{path}: init_lora_weights ({show(initialization)}) changes the weights that the adapters belong to; "
            "convert it with PEFT, by path_initial_model_for_weight_conversion"
        )
    for name, value in document.items():
        if name not in known and value:
            raise CheckpointError(
                f"{path}: {show(name)} ({show(value)}) is not read, and may change what the adapters do; remove it if "
                "it does not"
            )
