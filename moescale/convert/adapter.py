"""Adapters in and out: the two layouts in which others keep them, and weights with adapters merged into them.

``peft``: the layout of PEFT from 0.19.1 on. Routed experts are adapted as the stacked parameters that transformers 5
holds: A is [E * r, in], expert by expert, and B is [out, r * E], the expert innermost; ``experts.base_layer`` belongs
to gate and up, ``experts`` to down (``ParamWrapper`` in peft/tuners/lora/layer.py). ``per-expert``: two matrices for
each of ``experts.N.gate_proj``, ``up_proj`` and ``down_proj``, as servers want them; gate and up have the same A.

Layers of an MLP are named to PEFT as parameters: as modules it takes them for routed experts (huggingface/peft#3711).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moescale.config import ModelConfig
from moescale.convert.checkpoint import TensorSource, check_output
from moescale.convert.folder_weights import FolderWeights
from moescale.convert.key_table import build_key_table
from moescale.errors import CheckpointError, ConfigError
from moescale.files import InUseError, remedy, staged_folder, staging_path, write_atomically, written_by_library
from moescale.lora import LoraSettings
from moescale.models.lora import ExpertsAdapter, adapters_of, add_adapters
from moescale.models.registry import family_of
from moescale.models.transformer import build_on_meta
from moescale.records import FileKind, build, read_json_object, show

Layout = Literal["peft", "per-expert"]
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DTYPES = ("F32", "BF16", "F16", "F64")
_MLP = ("gate_proj", "up_proj", "down_proj")
_FILE = FileKind(
    noun="an adapter's configuration",
    error=CheckpointError,
    missing="missing; give the folder of an adapter, with adapter_config.json and adapter_model.safetensors",
    remedy="fetch the adapter again",
    ignores_unknown=True,
)


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """What an export of adapters wrote."""

    output: Path
    num_tensors: int
    weight_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Config:
    """What is read of an adapter_config.json."""

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
"""Fields of PEFT that do not change what stored adapters do: names of tensors say which modules have them, and how
factors were initialized is past. ``fan_in_fan_out`` is for a kind of layer that these models have none of."""
_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")
"""Those that leave the weights below as they are. Others, as pissa, change them too, and a folder does not say how."""


@dataclass(frozen=True, kw_only=True)
class _Adapted:
    """A module of the model that can have an adapter, and its modules in a Hugging Face folder."""

    name: str
    keys: tuple[str, ...]
    """One for each part; of routed experts the module that holds them."""
    num_experts: int
    """0: a linear layer."""

    def factors(self) -> tuple[str, ...]:
        """Names of the adapter's parameters."""
        names = ("gate_up_a", "gate_up_b", "down_a", "down_b") if self.num_experts else ("a", "b")
        return tuple(f"{self.name}.adapter.{name}" for name in names)


def adapted_modules(config: ModelConfig, lora: LoraSettings) -> list[_Adapted]:
    """The targets of ``lora`` in ``config``'s model. Raises ConfigError for one that it does not have."""
    model = build_on_meta(config, torch.bfloat16)
    add_adapters(model, lora)
    table, names = build_key_table(config), family_of(config).names
    found = []
    for name, adapter in adapters_of(model).items():
        if isinstance(adapter, ExpertsAdapter):
            before = table[f"{name}.down"][0].key.partition(f"{names.experts}.")[0]
            keys: tuple[str, ...] = (before + names.experts,)
            found.append(_Adapted(name=name, keys=keys, num_experts=adapter.down_a.shape[0]))
        else:
            keys = tuple(piece.key.removesuffix(".weight") for piece in table[f"{name}.weight"])
            found.append(_Adapted(name=name, keys=keys, num_experts=0))
    return found


def export_adapter(
    config: ModelConfig, lora: LoraSettings, source: TensorSource, output: Path, *, layout: Layout, base_model: str
) -> AdapterReport:
    """Write adapters as a folder of ``layout``.

    Args:
        source: the adapters' parameters, by their names in the model.
        base_model: what the written configuration says the adapters belong to.

    Raises CheckpointError where ``output`` exists or cannot be written, or a factor is missing or not finite.
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
        for key, tensor in _stored(module, factors, layout):
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"tensor '{key}' is not finite; nothing was exported")
            tensors[f"{_PREFIX}{key}.weight"] = tensor.contiguous().clone()
    document = _document(config, lora, modules, layout, base_model)
    try:
        with staged_folder(output) as folder:
            with written_by_library(folder / WEIGHTS_FILE):
                save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
            write_atomically(folder / CONFIG_FILE, json.dumps(document, indent=2) + "\n")
    except InUseError as error:
        raise CheckpointError(
            f"{output}: another process is exporting to it (it holds {staging_path(output)}); wait for its end, or "
            "give another --output"
        ) from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{output}: could not be written ({error}); {remedy(error) or 'give another --output'}"
        ) from error
    size = sum(tensor.nbytes for tensor in tensors.values())
    return AdapterReport(output=output, num_tensors=len(tensors), weight_bytes=size)


def _stored(module: _Adapted, factors: list[torch.Tensor], layout: Layout) -> Iterable[tuple[str, torch.Tensor]]:
    """The adapter's tensors under their names there, without prefix and ending."""
    if not module.num_experts:
        parts = (factor.chunk(len(module.keys)) for factor in factors)
        for key, a, b in zip(module.keys, *parts, strict=True):
            yield f"{key}.lora_A", a
            yield f"{key}.lora_B", b
        return
    (key,) = module.keys
    gate_up_a, gate_up_b, down_a, down_b = factors
    if layout == "peft":
        for wrapper, a, b in ((f"{key}.base_layer", gate_up_a, gate_up_b), (key, down_a, down_b)):
            yield f"{wrapper}.lora_A", a.flatten(0, 1)
            yield f"{wrapper}.lora_B", b.permute(1, 2, 0).flatten(1)
        return
    for expert in range(module.num_experts):
        gate_b, up_b = gate_up_b[expert].chunk(2)
        a = gate_up_a[expert]
        for part, (of_a, of_b) in zip(_MLP, ((a, gate_b), (a, up_b), (down_a[expert], down_b[expert])), strict=True):
            yield f"{key}.{expert}.{part}.lora_A", of_a
            yield f"{key}.{expert}.{part}.lora_B", of_b


def _document(
    config: ModelConfig, lora: LoraSettings, modules: list[_Adapted], layout: Layout, base_model: str
) -> dict:
    prefix = family_of(config).names.layer_prefix
    linear, parameters = set(), set()
    for module in modules:
        layer = module.name.split(".")[1]
        for key in module.keys:
            path = key.removeprefix(prefix.format(layer=layer))
            if module.num_experts:
                parameters |= {f"{path}.gate_up_proj", f"{path}.down_proj"}
            elif path.endswith(_MLP):
                parameters.add(f"{path}.weight")
            else:
                linear.add(path)
    if layout == "per-expert":  # every target is a layer there
        linear |= {path.removesuffix(".weight") for path in parameters if path.endswith(".weight")}
        linear |= set(_MLP) if any(module.num_experts for module in modules) else set()
        parameters = set()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        # PEFT refuses dropout where it adapts parameters; it acts in training alone.
        "lora_dropout": 0.0 if parameters else lora.dropout,
        "use_rslora": lora.rank_stabilised,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(linear),
        "target_parameters": sorted(parameters) or None,
    }


def read_adapter_settings(folder: Path, config: ModelConfig) -> LoraSettings:
    """Say what the adapters in ``folder`` are, by configuration and names of tensors. Raises CheckpointError."""
    path = folder / CONFIG_FILE
    document = read_json_object(path, _FILE)
    record = build(_Config, document, str(path), _FILE)
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
    try:
        whole = LoraSettings(rank=record.r, alpha=record.lora_alpha, rank_stabilised=record.use_rslora)
        stored = _names(folder)
        found = {
            module.name.split(".", 2)[2]
            for module in adapted_modules(config, whole)
            if any(f"{_PREFIX}{key}." in name for key in module.keys for name in stored)
        }
        if not found:
            raise CheckpointError(f"{folder / WEIGHTS_FILE}: holds no adapter of a module of this model")
        return LoraSettings(**(vars(whole) | {"targets": tuple(sorted(found)), "dropout": record.lora_dropout}))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _check_other_fields(document: dict[str, Any], path: Path) -> None:
    """Refuse a field that makes of the adapters something else than is read of them."""
    known = {field.name for field in dataclasses.fields(_Config)} | _DESCRIPTIVE
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


def read_adapter(folder: Path, config: ModelConfig, lora: LoraSettings) -> dict[str, torch.Tensor]:
    """The adapters in ``folder``, of either layout, by parameter name.

    Raises CheckpointError for a tensor that is missing, has no place in the model, or does not fit it.
    """
    path = folder / WEIGHTS_FILE
    unread, found = set(_names(folder)), {}
    modules = adapted_modules(config, lora)
    shapes = _stored_shapes(modules, config, lora)
    with safe_open(path, framework="pt") as file:

        def read(key: str) -> torch.Tensor:
            name = f"{_PREFIX}{key}.weight"
            if name not in unread:
                raise CheckpointError(f"{path}: lacks tensor '{name}', the model's adapters have it")
            taken.add(name)
            _check_tensor(path, name, file.get_slice(name), shapes[key])
            return file.get_tensor(name).float()

        taken: set[str] = set()
        for module in modules:
            for name, factor in zip(module.factors(), _factors(module, read, unread, lora.rank, path), strict=True):
                if not torch.isfinite(factor).all():
                    raise CheckpointError(f"{path}: adapter '{name}' has values that are not finite")
                found[name] = factor
        extra = unread - taken
        if extra:
            raise CheckpointError(
                f"{path}: tensor '{min(extra)}' belongs to no module among lora.targets ({'+'.join(lora.targets)})"
            )
    return found


def _stored_shapes(modules: Iterable[_Adapted], config: ModelConfig, lora: LoraSettings) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that either layout has, by its name without prefix and ending."""
    model = build_on_meta(config, torch.bfloat16)
    add_adapters(model, lora)
    return {
        key: tuple(tensor.shape)
        for module in modules
        for layout in get_args(Layout)
        for key, tensor in _stored(module, [model.get_parameter(name) for name in module.factors()], layout)
    }


def _check_tensor(path: Path, name: str, stored: Any, shape: tuple[int, ...]) -> None:
    """Refuse a tensor by what its file's header says, before it is read and joined with others."""
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


def _factors(
    module: _Adapted, read: Callable[[str], torch.Tensor], stored: set[str], rank: int, path: Path
) -> list[torch.Tensor]:
    """The inverse of :func:`_stored`."""
    if not module.num_experts:
        return [torch.cat([read(f"{key}.{factor}") for key in module.keys]) for factor in ("lora_A", "lora_B")]
    (key,) = module.keys
    if f"{_PREFIX}{key}.base_layer.lora_A.weight" in stored:
        factors = []
        for wrapper in (f"{key}.base_layer", key):
            a, b = read(f"{wrapper}.lora_A"), read(f"{wrapper}.lora_B")
            factors += [a.unflatten(0, (module.num_experts, rank)), b.unflatten(1, (rank, -1)).permute(2, 0, 1)]
        return factors
    gate, up, down = (
        [
            [read(f"{key}.{expert}.{part}.{factor}") for expert in range(module.num_experts)]
            for factor in ("lora_A", "lora_B")
        ]
        for part in _MLP
    )
    if not all(torch.equal(*pair) for pair in zip(gate[0], up[0], strict=True)):
        raise CheckpointError(
            f"{path}: gate_proj and up_proj of '{key}' have different lora_A; here they share one, as they do in an "
            "adapter of the stacked experts"
        )
    gate_up_b = torch.stack([torch.cat(pair) for pair in zip(gate[1], up[1], strict=True)])
    return [torch.stack(gate[0]), gate_up_b, torch.stack(down[0]), torch.stack(down[1])]


def _names(folder: Path) -> list[str]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; give the folder of an adapter, with {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or damaged ({error}); fetch it again") from error


class MergedWeights:
    """The weights of a folder, in the dtype that they were trained on, with adapters added to them in fp32.

    A source for :func:`moescale.convert.checkpoint.export_checkpoint`.
    """

    def __init__(self, base: FolderWeights, adapters: TensorSource, config: ModelConfig, lora: LoraSettings) -> None:
        self._base, self._adapters, self._scale = base, adapters, lora.scale
        self._added: dict[str, tuple[str, str, int]] = {}
        for module in adapted_modules(config, lora):
            names = module.factors()
            if module.num_experts:
                self._added[f"{module.name}.gate_up"] = (names[0], names[1], 1)
                self._added[f"{module.name}.down"] = (names[2], names[3], 1)
            else:
                self._added[f"{module.name}.weight"] = (names[0], names[1], len(module.keys))

    def names(self) -> Iterable[str]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """The parameter in fp32, or with ``index`` its slice of dim 0."""
        weight = self._base.read(name, index).float()
        if name not in self._added:
            return weight
        a_name, b_name, parts = self._added[name]
        a, b = (self._adapters.read(factor, index).float() for factor in (a_name, b_name))
        deltas = [torch.matmul(of_b, of_a) for of_a, of_b in zip(a.chunk(parts), b.chunk(parts), strict=True)]
        return weight + self._scale * (deltas[0] if parts == 1 else torch.cat(deltas))
