"""What a user asks of the planner, and one point of the space it searches."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from moescale.config import ModelConfig
from moescale.formats import (
    EXACT_MASTERS,
    PLANNED_GRADIENTS,
    PLANNED_MASTERS,
    PLANNED_MOMENTS,
    ComputeFormat,
    GemmFormat,
    GradientFormat,
    MasterFormat,
    MomentFormat,
)
from moescale.lora import LoraSettings
from moescale.plan import DenseSharding, LayerPlan, MeshShape, no_experts_in_fp8

RECOMPUTE_CHOICES = ("none", "experts", "block")
"""Keep everything; recompute the experts' up-projection; recompute the whole block."""


def recompute_choices(operators: Container[str]) -> tuple[str, ...]:
    """What layers with these operators may recompute."""
    return tuple(choice for choice in RECOMPUTE_CHOICES if choice in ("none", "block") or choice in operators)


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
    fp8_gemms: bool = False
    """Also GEMMs of trained weights in fp8, where that is faster and fits."""
    lora: LoraSettings | None = None
    """Adapters to train with all other weights frozen; in fp32, gradients and optimizer state too."""
    exact_weights: bool = True
    """Only master-weight formats that are exactly fp32; False: also bf16 weights with stochastic rounding."""
    router_imbalance: float = 1.1
    """Rows of the fullest rank over the mean, where experts are split over ranks."""
    allow_unsupported: bool = False
    """Also plans that this version's runtime cannot run."""
    pins: Mapping[str, str] = field(default_factory=dict)
    """Decision -> the value it must have."""
    forbidden: frozenset[tuple[str, str]] = frozenset()
    """(decision, value) pairs that are out of the question."""

    def allows(self, name: str, value: object) -> bool:
        """Whether pins and prohibitions leave ``value`` for the decision ``name``."""
        text = decision_text(value)
        return self.pins.get(name, text) == text and (name, text) not in self.forbidden


@dataclass(frozen=True, kw_only=True)
class Formats:
    """How optimizer, master weights and gradients are kept."""

    optimizer_state_dtype: MomentFormat
    master_weight_format: MasterFormat
    gradient_dtype: GradientFormat
    offload_optimizer: bool


@dataclass(frozen=True, kw_only=True)
class Gemms:
    """Operands of the GEMMs of trained weights inside the layers."""

    expert_gemms: GemmFormat = "compute"
    dense_gemms: GemmFormat = "compute"


IN_COMPUTE_DTYPE = Gemms()


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
    gemms: Gemms = IN_COMPUTE_DTYPE

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
            **vars(self.gemms),
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


def gemm_choices(request: PlanRequest, config: ModelConfig) -> list[Gemms]:
    """Every combination of formats of GEMMs that the request allows a plan of ``config``'s model; exact ones first."""
    experts: list[GemmFormat] = ["compute"]
    dense: list[GemmFormat] = ["compute"]
    if request.fp8_gemms:
        dense.append("fp8")
        if no_experts_in_fp8(config) is None:
            experts.append("fp8")
    return [
        Gemms(expert_gemms=of_experts, dense_gemms=of_dense)
        for of_experts in experts
        for of_dense in dense
        if request.allows("expert_gemms", of_experts) and request.allows("dense_gemms", of_dense)
    ]
