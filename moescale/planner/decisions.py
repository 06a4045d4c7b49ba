"""Every decision of a plan by name, the values it can have, and what of a request no plan could satisfy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import get_args

from moescale.config import ModelConfig
from moescale.errors import ConfigError, nearest
from moescale.formats import PLANNED_GRADIENTS, PLANNED_MASTERS, PLANNED_MOMENTS, GemmFormat
from moescale.models.registry import family_of
from moescale.plan import DenseSharding, MeshShape, is_supported, no_experts_in_fp8
from moescale.planner.axes.registry import AXES
from moescale.planner.cluster import FP8_RATES, Cluster
from moescale.planner.request import PlanRequest, recompute_choices

GEMM_DECISIONS = ("expert_gemms", "dense_gemms")
DECISIONS = (
    *(axis.name for axis in dataclasses.fields(MeshShape)),
    *("dense_sharding", "micro_batch_sequences"),
    *("optimizer_state_dtype", "master_weight_format", "gradient_dtype", "offload_optimizer"),
    *GEMM_DECISIONS,
)
"""Names under which a decision of the whole plan can be pinned or forbidden."""
VALUES: Mapping[str, tuple[str, ...]] = {
    "dense_sharding": get_args(DenseSharding),
    "optimizer_state_dtype": PLANNED_MOMENTS,
    "master_weight_format": PLANNED_MASTERS,
    "gradient_dtype": PLANNED_GRADIENTS,
    "offload_optimizer": ("true", "false"),
    **dict.fromkeys(GEMM_DECISIONS, get_args(GemmFormat)),
}
"""What such a decision can be, as it is written in ``--pin name=value``; all others are whole numbers."""
ADAPTER_FORMATS = {
    "optimizer_state_dtype": "fp32",
    "master_weight_format": "fp32",
    "gradient_dtype": "fp32",
    "offload_optimizer": "false",
}
"""Of adapters, which are too small to save memory on."""


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


def check_request(request: PlanRequest, config: ModelConfig) -> None:
    """Raise ConfigError for what no plan of ``config``'s model could satisfy."""
    for name, default in (
        ("runtime_gpus", "as many as plan_gpus"),
        ("tokens_per_step", "131072"),
        ("sequence_length", "2048"),
    ):
        if getattr(request, name) < 1:
            raise ConfigError(
                f"compile.{name} ({getattr(request, name)}) must be at least 1; leave it out for {default}"
            )
    if request.plan_gpus is not None:
        if request.plan_gpus < 1:
            raise ConfigError(
                f"compile.plan_gpus ({request.plan_gpus}) must be at least 1, or auto for the fastest number"
            )
        if request.runtime_gpus % request.plan_gpus:
            raise ConfigError(
                f"compile.runtime_gpus ({request.runtime_gpus}) must be a multiple of compile.plan_gpus "
                f"({request.plan_gpus}): whole copies of the weights"
            )
    if request.sequence_length > config.max_sequence_length:
        raise ConfigError(
            f"compile.sequence_length ({request.sequence_length}) must not exceed model.max_sequence_length "
            f"({config.max_sequence_length}); give a shorter one"
        )
    if request.tokens_per_step % request.sequence_length:
        raise ConfigError(
            f"compile.tokens_per_step ({request.tokens_per_step}) must be a multiple of compile.sequence_length "
            f"({request.sequence_length}); {_nearest_multiples(request.tokens_per_step, request.sequence_length)}"
        )
    if request.memory_limit_bytes is not None and request.memory_limit_bytes <= 0:
        raise ConfigError(
            f"compile.memory_limit ({request.memory_limit_bytes} bytes) must be positive; leave it out for all of the "
            "GPU's memory"
        )
    if not 1 <= request.router_imbalance < math.inf:
        raise ConfigError(
            f"compile.router_imbalance ({request.router_imbalance}) must be a number of at least 1, which is "
            "balanced; leave it out for 1.1"
        )
    decisions = decision_values(config)
    for option, pairs in (("--pin", request.pins.items()), ("--forbid", sorted(request.forbidden))):
        for name, value in pairs:
            if name not in decisions:
                raise ConfigError(
                    f"'{name}' is not a decision of a plan for this model{nearest(name, decisions)}; known are "
                    f"{', '.join(decisions)}"
                )
            _check_value(option, name, value, decisions[name])
    for name, value in request.pins.items():
        _check_pin(request, config, name, value)


def check_fp8(request: PlanRequest, cluster: Cluster) -> None:
    """Raise ConfigError where GEMMs in fp8 are asked for and ``cluster`` has none, or other weights are trained."""
    if not request.fp8_gemms:
        return
    if request.compute_dtype != "bf16":
        raise ConfigError(
            f"compile.precision (fp8) computes everything but GEMMs in bf16, not {request.compute_dtype}; leave one out"
        )
    if request.lora is not None:
        raise ConfigError(
            f"compile.precision (fp8) is for weights that are trained, and compile.lora ({request.lora.text()}) trains "
            "adapters; drop one of the two (base=fp8 in --lora keeps frozen weights in fp8)"
        )
    missing = [name for name in FP8_RATES if getattr(cluster, name) is None]
    if missing:
        raise ConfigError(
            f"compile.precision (fp8) needs the rates of GEMMs in fp8, and cluster '{cluster.name}' ({cluster.gpu}) "
            f"has no {' and no '.join(f'[{name}]' for name in missing)}; give a cluster with fp8 such as h200, add the "
            "tables to this one's file where its GPUs have fp8, or plan with --precision bf16"
        )


def _check_gemms_pin(request: PlanRequest, config: ModelConfig, name: str) -> None:
    """Refuse GEMMs in fp8 that no plan of this request has."""
    pin = f"--pin {name}=fp8"
    if not request.fp8_gemms:
        raise ConfigError(f"{pin}: {name} must be compute without --precision fp8; add that option, or drop the pin")
    if request.runtime_gpus > 1 and not request.allows("dense_sharding", "zero1"):
        raise ConfigError(
            f"{pin}: on several GPUs {name} must be compute unless dense_sharding is zero1: copies in fp8 are made of "
            "whole weights; drop the pin, or let dense_sharding be zero1"
        )
    obstacle = no_experts_in_fp8(config) if name == "expert_gemms" else None
    if obstacle is not None:
        raise ConfigError(f"{pin}: {name} must be compute: {obstacle}; drop the pin")


def _check_pin(request: PlanRequest, config: ModelConfig, name: str, value: str) -> None:
    """Refuse a value that the decision has in no plan of this model, these GPUs and tokens."""
    if not is_supported(name) and value != "1" and not request.allow_unsupported:
        raise ConfigError(
            f"--pin {name}={value}: this version's runtime has no {name}, so {name} must be 1; plan it all the "
            "same with --allow-unsupported"
        )
    if request.lora is not None and name in ADAPTER_FORMATS and value != ADAPTER_FORMATS[name]:
        raise ConfigError(
            f"--pin {name}={value}: {name} must be {ADAPTER_FORMATS[name]} with --lora, which keeps adapters in "
            "fp32; drop the pin"
        )
    if name == "master_weight_format" and request.compute_dtype == "fp32" and value != "fp32":
        raise ConfigError(f"--pin {name}={value}: {name} must be fp32 where compile.precision is fp32")
    if name in GEMM_DECISIONS and value == "fp8":
        _check_gemms_pin(request, config, name)
    if name not in DECISIONS:
        _check_number_of_layers(config, name, value)
        return
    axis = next((axis for axis in AXES if axis.name == name), None)
    if axis is not None:
        whole, words = axis.multiple(request, config)
    elif name == "micro_batch_sequences":
        whole = request.tokens_per_step // request.sequence_length
        words = f"the {whole} sequences of compile.tokens_per_step ({request.tokens_per_step})"
    else:
        return
    if whole % int(value):
        allowed = ", ".join(str(size) for size in range(1, whole + 1) if whole % size == 0)
        raise ConfigError(f"--pin {name}={value}: {name} must be a divisor of {words}: one of {allowed}")


def _check_number_of_layers(config: ModelConfig, name: str, value: str) -> None:
    for kind in family_of(config).layers(config):
        if name == f"{kind.name}_recompute_layers" and value != "all" and int(value) > kind.count:
            raise ConfigError(
                f"--pin {name}={value}: {name} must be all, or at most {kind.count}, the model's {kind.name} layers"
            )


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


def _nearest_multiples(number: int, unit: int) -> str:
    """Name the multiples of ``unit`` next to ``number``, to choose from."""
    below = number // unit * unit
    return f"{below} and {below + unit} are" if below else f"{unit} is the least"
