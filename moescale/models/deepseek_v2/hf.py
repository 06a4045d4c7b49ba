"""A DeepSeek-V2 model's config.json. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moescale.models.deepseek_v2.config import DeepSeekV2Config
from moescale.models.hf_fields import FieldRules
from moescale.models.latent import hf as latent

RULES = FieldRules(
    only=latent.ONLY | {"scoring_func": ("softmax",), "num_nextn_predict_layers": (0, None)},
    required=latent.REQUIRED,
    integers=latent.INTEGERS,
    numbers=latent.NUMBERS,
    flags=latent.FLAGS,
    texts=frozenset({"topk_method"}),
    others=latent.OTHERS,
    aliases=latent.ALIASES,
    absent=latent.ABSENT,
)


def read_hf(document: Mapping[str, Any], path: str) -> DeepSeekV2Config:
    """Translate the fields of a config.json; ``path`` names the file in errors. Raises ConfigError."""
    return latent.read_latent(
        DeepSeekV2Config, document, path, RULES, routing_method=document.get("topk_method") or "greedy"
    )


def write_hf(config: DeepSeekV2Config, dtype: str) -> dict[str, Any]:
    """Return the config.json of a model that has none yet; :func:`read_hf` gives ``config`` back.

    Args:
        dtype: name of the torch dtype of the weights it is written for.
    """
    return latent.write_latent(config, dtype, "DeepseekV2ForCausalLM", scoring_func="softmax")


def transformers_differences(config: DeepSeekV2Config) -> list[str]:
    """Return where transformers' own DeepSeek-V2 (5.17 to 5.23) departs from the published definition."""
    found = latent.layout_differences(config)
    if config.num_experts is not None and config.normalize_topk and config.top_k > 1:
        found.append("norm_topk_prob is true: transformers ignores it and applies routed_scaling_factor instead")
    return found
