"""Routing that families without groups, shared experts and dense layers have in common in config.json. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moescale.models.hf_fields import value_or

PLAIN_ROUTING: dict[str, Any] = dict(
    num_shared_experts=0,
    first_moe_layer=0,
    moe_layer_frequency=1,
    routing_method="greedy",
    num_groups=1,
    top_k_groups=1,
    routed_scaling_factor=1.0,
    aux_loss_per_sequence=False,
)
"""Fields of a configuration: each token chooses among all experts of every layer by softmax, and none is shared."""


def read_aux_loss(document: Mapping[str, Any], default: float) -> float:
    """Return the weight of the balancing loss: transformers has it only where the router's logits are asked for."""
    if not document.get("output_router_logits"):
        return 0.0
    return float(value_or(document, "router_aux_loss_coef", default))
