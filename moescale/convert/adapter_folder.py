"""Writes the adapters of a run to a folder, and reads a folder of adapters with every tensor checked."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moescale.config import ModelConfig
from moescale.convert.adapter_config import CONFIG_FILE, adapter_document, read_adapter_config
from moescale.convert.adapter_layout import (
    PREFIX,
    WEIGHTS_FILE,
    AdaptedModule,
    Layout,
    adapted_modules,
    read_factors,
    stored_tensors,
)
from moescale.convert.staged_export import check_output, staged_export
from moescale.convert.tensor_source import TensorSource
from moescale.errors import CheckpointError, ConfigError
from moescale.files import write_atomically, written_by_library
from moescale.lora import LoraSettings
from moescale.models.lora import add_adapters
from moescale.models.transformer import build_on_meta

_DTYPES = ("F32", "BF16", "F16", "F64")


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """Summary of an export of adapters."""

    output: Path
    num_tensors: int
    weight_bytes: int


def export_adapter(
    config: ModelConfig, lora: LoraSettings, source: TensorSource, output: Path, *, layout: Layout, base_model: str
) -> AdapterReport:
    """Write adapters as a folder of ``layout``.

    Args:
        source: the adapters' parameters, by their names in the model.
        base_model: name of the base model for the written configuration.

    Raises CheckpointError if ``output`` exists or cannot be written, or a factor is missing or not finite.
    """
    check_output(output)
    modules = adapted_modules(config, lora)
    known = set(source.names())
    tensors: dict[str, torch.Tensor] = {}
    for module in modules:
        missing = [name for name in module.factors() if name not in known]
        if missing:
            raise CheckpointError(f"the weights lack parameter '{missing[0]}'")
        factors = [source.read(name) for name in module.factors()]
        for key, tensor in stored_tensors(module, factors, layout):
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"tensor '{key}' is not finite; nothing was exported")
            tensors[f"{PREFIX}{key}.weight"] = tensor.contiguous().clone()
    document = adapter_document(config, lora, modules, layout, base_model)
    with staged_export(output) as folder:
        with written_by_library(folder / WEIGHTS_FILE):
            save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        write_atomically(folder / CONFIG_FILE, json.dumps(document, indent=2) + "\n")
    size = sum(tensor.nbytes for tensor in tensors.values())
    return AdapterReport(output=output, num_tensors=len(tensors), weight_bytes=size)


def read_adapter_settings(folder: Path, config: ModelConfig) -> LoraSettings:
    """Return the settings of the adapters in ``folder``, from its configuration and the names of its tensors.

    Raises CheckpointError.
    """
    path = folder / CONFIG_FILE
    record = read_adapter_config(path)
    try:
        whole = LoraSettings(rank=record.r, alpha=record.lora_alpha, rank_stabilised=record.use_rslora)
        stored = _names(folder)
        found = {
            module.name.split(".", 2)[2]
            for module in adapted_modules(config, whole)
            if any(f"{PREFIX}{key}." in name for key in module.keys for name in stored)
        }
        if not found:
            raise CheckpointError(f"{folder / WEIGHTS_FILE}: holds no adapter of a module of this model")
        return LoraSettings(**(vars(whole) | {"targets": tuple(sorted(found)), "dropout": record.lora_dropout}))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_adapter(folder: Path, config: ModelConfig, lora: LoraSettings) -> dict[str, torch.Tensor]:
    """Return the adapters in ``folder``, which may have either layout, by parameter name.

    Raises CheckpointError for a tensor that is missing, belongs to no target, or has the wrong shape or dtype.
    """
    path = folder / WEIGHTS_FILE
    unread, found = set(_names(folder)), {}
    modules = adapted_modules(config, lora)
    shapes = _stored_shapes(modules, config, lora)
    with safe_open(path, framework="pt") as file:

        def read(key: str) -> torch.Tensor:
            name = f"{PREFIX}{key}.weight"
            if name not in unread:
                raise CheckpointError(f"{path}: lacks tensor '{name}', the model's adapters have it")
            taken.add(name)
            _check_tensor(path, name, file.get_slice(name), shapes[key])
            return file.get_tensor(name).float()

        taken: set[str] = set()
        for module in modules:
            for name, factor in zip(module.factors(), read_factors(module, read, unread, lora.rank, path), strict=True):
                if not torch.isfinite(factor).all():
                    raise CheckpointError(f"{path}: adapter '{name}' has values that are not finite")
                found[name] = factor
        extra = unread - taken
        if extra:
            raise CheckpointError(
                f"{path}: tensor '{min(extra)}' belongs to no module among lora.targets ({'+'.join(lora.targets)})"
            )
    return found


def _stored_shapes(
    modules: Iterable[AdaptedModule], config: ModelConfig, lora: LoraSettings
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of either layout, by its name without prefix and suffix."""
    model = build_on_meta(config, torch.bfloat16)
    add_adapters(model, lora)
    return {
        key: tuple(tensor.shape)
        for module in modules
        for layout in get_args(Layout)
        for key, tensor in stored_tensors(module, [model.get_parameter(name) for name in module.factors()], layout)
    }


def _check_tensor(path: Path, name: str, stored: Any, shape: tuple[int, ...]) -> None:
    """Raise CheckpointError if the file's header gives the tensor another dtype or shape."""
    if stored.get_dtype() not in _DTYPES:
        raise CheckpointError(
            f"{path}: tensor '{name}' has dtype {stored.get_dtype()}; supported are {', '.join(_DTYPES)}"
        )
    if tuple(stored.get_shape()) != shape:
        is_stacked = name.rpartition(".lora_")[0].endswith(("experts", "experts.base_layer"))
        older = "; if PEFT before 0.19.1 wrote it, save it again with a newer one" if is_stacked else ""
        raise CheckpointError(
            f"{path}: tensor '{name}' has shape {tuple(stored.get_shape())}, the model's adapters have {shape}{older}"
        )


def _names(folder: Path) -> list[str]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; give the folder of an adapter, with {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or damaged ({error}); fetch it again") from error
