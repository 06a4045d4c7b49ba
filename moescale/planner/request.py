"""What a user asks of the planner, and one point of the space it searches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from moescale.config import ModelConfig
from moescale.errors import ConfigError, nearest
from moescale.formats import (
    EXACT_MASTERS,
    PLANNED_GRADIENTS,
    PLANNED_MASTERS,
    PLANNED_MOMENTS,
    ComputeFormat,
    GradientFormat,
    MasterFormat,
    MomentFormat,
)
from moescale.lora import LoraSettings
from moescale.models.registry import family_of
from moescale.plan import UNSUPPORTED_AXES, DenseSharding, LayerPlan, MeshShape

DECISIONS = (
    *("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "dense_sharding", "micro_batch_sequences"),
    *("optimizer_state_dtype", "master_weight_format", "gradient_dtype", "offload_optimizer"),
)
"""Names under which a decision of the whole plan can be pinned or forbidden."""
RECOMPUTE_CHOICES = ("none", "experts", "block")
"""Keep everything; recompute the experts' up-projection; recompute the whole block."""

VALUES: Mapping[str, tuple[str, ...]] = {
    "dense_sharding": get_args(DenseSharding),
    "optimizer_state_dtype": PLANNED_MOMENTS,
    "master_weight_format": PLANNED_MASTERS,
    "gradient_dtype": PLANNED_GRADIENTS,
    "offload_optimizer": ("true", "false"),
}
"""What such a decision can be, as it is written in ``--pin name=value``; all others are whole numbers."""


def recompute_choices(operators: Container[str]) -> tuple[str, ...]:
    """What layers with these operators may recompute."""
    return tuple(choice for choice in RECOMPUTE_CHOICES if choice in ("none", "block") or choice in operators)


def decision_values(config: ModelConfig) -> dict[str, tuple[str, ...] | None]:
    """Every decision of a plan for ``config``, by name, with the values it can have; None: whole numbers.

    Each layer kind of the model's family has three: ``KIND_recompute``, ``KIND_recompute_layers`` (how many of its
    layers do, from the first; also ``all``) and ``KIND_reshard``.
    """
    found: dict[str, tuple[str, ...] | None] = {name: VALUES.get(name) for name in DECISIONS}
    for kind in family_of(config).layers(config):
        found[f"{kind.name}_recompute"] = recompute_choices(kind.operators)
        found[f"{kind.name}_recompute_layers"] = None
        found[f"{kind.name}_reshard"] = ("true", "false")
    return found


ADAPTER_FORMATS = {
    "optimizer_state_dtype": "fp32",
    "master_weight_format": "fp32",
    "gradient_dtype": "fp32",
    "offload_optimizer": "false",
}
"""Of adapters, which are too small to save memory on."""


def _nearest_multiples(number: int, unit: int) -> str:
    """Name the multiples of ``unit`` next to ``number``, to choose from."""
    below = number // unit * unit
    return f"{below} and {below + unit} are" if below else f"{unit} is the least"


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What to plan for."""

    runtime_gpus: int
    tokens_per_step: int
    sequence_length: int
    plan_gpus: int | None = None
    """GPUs that hold one full copy of the weights; None: whatever is fastest."""
    memory_limit_bytes: int | None = None
    """Per GPU, below what the cluster file says."""
    compute_dtype: ComputeFormat = "bf16"
    lora: LoraSettings | None = None
    """Adapters to train with all other weights frozen; in fp32, gradients and optimizer state too."""
    exact_weights: bool = True
    """Only master-weight formats that are exactly fp32; False: also bf16 weights with stochastic rounding."""
    router_imbalance: float = 1.1
    """Rows of the fullest rank over the mean, where experts are split over ranks."""
    allow_unsupported: bool = False
    """Also plans that this version's runtime cannot run (pp, cp, tp)."""
    pins: Mapping[str, str] = field(default_factory=dict)
    """Decision -> the value it must have."""
    forbidden: frozenset[tuple[str, str]] = frozenset()
    """(decision, value) pairs that are out of the question."""

    def validate(self, config: ModelConfig) -> None:
        """Raise ConfigError for what no plan could satisfy."""
        for name, default in (
            ("runtime_gpus", "as many as plan_gpus"),
            ("tokens_per_step", "131072"),
            ("sequence_length", "2048"),
        ):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"compile.{name} ({getattr(self, name)}) must be at least 1; leave it out for {default}"
                )
        if self.plan_gpus is not None:
            if self.plan_gpus < 1:
                raise ConfigError(
                    f"compile.plan_gpus ({self.plan_gpus}) must be at least 1, or auto for the fastest number"
                )
            if self.runtime_gpus % self.plan_gpus:
                raise ConfigError(
                    f"compile.runtime_gpus ({self.runtime_gpus}) must be a multiple of compile.plan_gpus "
                    f"({self.plan_gpus}): whole copies of the weights"
                )
        if self.sequence_length > config.max_sequence_length:
            raise ConfigError(
                f"compile.sequence_length ({self.sequence_length}) must not exceed model.max_sequence_length "
                f"({config.max_sequence_length}); give a shorter one"
            )
        if self.tokens_per_step % self.sequence_length:
            raise ConfigError(
                f"compile.tokens_per_step ({self.tokens_per_step}) must be a multiple of compile.sequence_length "
                f"({self.sequence_length}); {_nearest_multiples(self.tokens_per_step, self.sequence_length)}"
            )
        if self.memory_limit_bytes is not None and self.memory_limit_bytes <= 0:
            raise ConfigError(
                f"compile.memory_limit ({self.memory_limit_bytes} bytes) must be positive; leave it out for all of the "
                "GPU's memory"
            )
        if not 1 <= self.router_imbalance < math.inf:
            raise ConfigError(
                f"compile.router_imbalance ({self.router_imbalance}) must be a number of at least 1, which is "
                "balanced; leave it out for 1.1"
            )
        decisions = decision_values(config)
        for option, pairs in (("--pin", self.pins.items()), ("--forbid", sorted(self.forbidden))):
            for name, value in pairs:
                if name not in decisions:
                    raise ConfigError(
                        f"'{name}' is not a decision of a plan for this model{nearest(name, decisions)}; known are "
                        f"{', '.join(decisions)}"
                    )
                _check_value(option, name, value, decisions[name])
        for name, value in self.pins.items():
            self._check_pin(config, name, value)

    def _check_pin(self, config: ModelConfig, name: str, value: str) -> None:
        """Refuse a value that the decision has in no plan of this model, these GPUs and tokens."""
        if name in UNSUPPORTED_AXES and value != "1" and not self.allow_unsupported:
            raise ConfigError(
                f"--pin {name}={value}: this version's runtime has no {name}, so {name} must be 1; plan it all the "
                "same with --allow-unsupported"
            )
        if self.lora is not None and name in ADAPTER_FORMATS and value != ADAPTER_FORMATS[name]:
            raise ConfigError(
                f"--pin {name}={value}: {name} must be {ADAPTER_FORMATS[name]} with --lora, which keeps adapters in "
                "fp32; drop the pin"
            )
        if name == "master_weight_format" and self.compute_dtype == "fp32" and value != "fp32":
            raise ConfigError(f"--pin {name}={value}: {name} must be fp32 where compile.precision is fp32")
        if name not in DECISIONS:
            self._check_number_of_layers(config, name, value)
            return
        whole, why = self.runtime_gpus, f"a divisor of compile.runtime_gpus ({self.runtime_gpus})"
        if name == "micro_batch_sequences":
            whole = self.tokens_per_step // self.sequence_length
            why = f"a divisor of the {whole} sequences of compile.tokens_per_step ({self.tokens_per_step})"
        elif name == "ep":
            whole = math.gcd(whole, config.num_experts or 1)
            why += f" and of model.num_experts ({config.num_experts or 'none, so 1'})"
        elif name in VALUES:
            return
        if whole % int(value):
            allowed = ", ".join(str(size) for size in range(1, whole + 1) if whole % size == 0)
            raise ConfigError(f"--pin {name}={value}: {name} must be {why}: one of {allowed}")

    def _check_number_of_layers(self, config: ModelConfig, name: str, value: str) -> None:
        for kind in family_of(config).layers(config):
            if name == f"{kind.name}_recompute_layers" and value != "all" and int(value) > kind.count:
                raise ConfigError(
                    f"--pin {name}={value}: {name} must be all, or at most {kind.count}, the model's {kind.name} layers"
                )

    def allows(self, name: str, value: object) -> bool:
        """Whether pins and prohibitions leave ``value`` for the decision ``name``."""
        text = decision_text(value)
        return self.pins.get(name, text) == text and (name, text) not in self.forbidden


def _check_value(option: str, name: str, value: str, values: tuple[str, ...] | None) -> None:
    """Refuse what is not a value of a decision, whatever the number of GPUs."""
    if value == "all" and name.endswith("_recompute_layers"):
        return
    if values is not None:
        if value not in values:
            raise ConfigError(f"{option} {name}={value}: {name} must be one of {', '.join(values)}")
    elif not value.isdecimal() or value != str(int(value)) or value == "0":
        raise ConfigError(
            f"{option} {name}={value}: {name} must be one whole number of at least 1, for example {name}=2; "
            "repeat the option for several"
        )


@dataclass(frozen=True, kw_only=True)
class Formats:
    """How optimizer, master weights and gradients are kept."""

    optimizer_state_dtype: MomentFormat
    master_weight_format: MasterFormat
    gradient_dtype: GradientFormat
    offload_optimizer: bool


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One point of the search space."""

    mesh: MeshShape
    micro_batch_sequences: int
    gradient_accumulation_steps: int
    layers: tuple[LayerPlan, ...]
    """One for each layer kind of the model's family, in its order."""
    formats: Formats
    dense_sharding: DenseSharding = "fsdp"

    def with_layer(self, layer: LayerPlan) -> Candidate:
        """The same with another plan for one kind of layers."""
        return dataclasses.replace(self, layers=replace_layer(self.layers, layer))

    def decisions(self) -> dict[str, Any]:
        """Every decision by the name under which it can be pinned."""
        return {
            **{f.name: getattr(self.mesh, f.name) for f in dataclasses.fields(MeshShape)},
            "dense_sharding": self.dense_sharding,
            "micro_batch_sequences": self.micro_batch_sequences,
            **{f"{layer.kind}_recompute": recompute_name(layer) for layer in self.layers},
            **{f"{layer.kind}_recompute_layers": layer.recompute_layers or "all" for layer in self.layers},
            **{f"{layer.kind}_reshard": layer.reshard_after_forward for layer in self.layers},
            **vars(self.formats),
        }


def replace_layer(layers: tuple[LayerPlan, ...], layer: LayerPlan) -> tuple[LayerPlan, ...]:
    """``layers`` with ``layer`` in the place of that of its kind."""
    return tuple(layer if other.kind == layer.kind else other for other in layers)


def decision_text(value: object) -> str:
    """How a value is written in ``--pin name=value``."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def recompute_name(layer: LayerPlan) -> str:
    """``none``, ``block`` or the names of the recomputed operators."""
    return layer.recompute if isinstance(layer.recompute, str) else "+".join(layer.recompute)


def layer_plan(kind: str, recompute: str, reshard: bool) -> LayerPlan:
    """The inverse of :func:`recompute_name`."""
    if recompute in ("none", "block"):
        return LayerPlan(kind=kind, recompute=recompute, reshard_after_forward=reshard)  # type: ignore[arg-type]
    return LayerPlan(kind=kind, recompute=tuple(recompute.split("+")), reshard_after_forward=reshard)


def format_choices(request: PlanRequest) -> list[Formats]:
    """Every combination of formats the request allows; exact ones first."""
    masters: tuple[MasterFormat, ...] = PLANNED_MASTERS
    gradients: tuple[GradientFormat, ...] = PLANNED_GRADIENTS
    moment_formats: tuple[MomentFormat, ...] = PLANNED_MOMENTS
    if request.lora is not None:
        masters, gradients, moment_formats = ("fp32",), ("fp32",), ("fp32",)
    elif request.compute_dtype == "fp32":
        masters, gradients = ("fp32",), ("fp32",)
    elif request.exact_weights and "master_weight_format" not in request.pins:
        masters = EXACT_MASTERS
    return [
        Formats(
            optimizer_state_dtype=moments,
            master_weight_format=master,
            gradient_dtype=gradient,
            offload_optimizer=offload,
        )
        for offload in ((False, True) if request.lora is None else (False,))
        for gradient in gradients
        for master in masters
        for moments in moment_formats
        if request.allows("optimizer_state_dtype", moments)
        and request.allows("master_weight_format", master)
        and request.allows("gradient_dtype", gradient)
        and request.allows("offload_optimizer", offload)
    ]
