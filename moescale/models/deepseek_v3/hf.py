"""A DeepSeek-V3 model's config.json. Imports no torch.

The published configuration class and that of transformers give an absent field different values, so those that decide
the routing must be there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moescale.models.deepseek_v3.config import DeepSeekV3Config
from moescale.models.hf_fields import FieldRules
from moescale.models.latent import hf as latent

RULES = FieldRules(
    only=latent.ONLY | latent.SIGMOID_ROUTING,
    required=(*latent.REQUIRED, *latent.REQUIRED_OF_ROUTING, "first_k_dense_replace"),
    integers=latent.INTEGERS | latent.PREDICTION_LAYERS.keys() | {"num_nextn_predict_layers"},
    numbers=latent.NUMBERS,
    flags=latent.FLAGS,
    others=latent.OTHERS,
    aliases=latent.ALIASES | latent.PREDICTION_LAYERS,
    absent=latent.ABSENT,
)


def read_hf(document: Mapping[str, Any], path: str) -> DeepSeekV3Config:
    """Translate the fields of a config.json; ``path`` names the file in errors. Raises ConfigError."""
    return latent.read_latent(DeepSeekV3Config, document, path, RULES, routing_method="noaux_tc")


def write_hf(config: DeepSeekV3Config, dtype: str) -> dict[str, Any]:
    """Return the config.json of a model that has none yet; :func:`read_hf` gives ``config`` back.

    Args:
        dtype: name of the torch dtype of the weights it is written for.
    """
    return latent.write_latent(
        config,
        dtype,
        "DeepseekV3ForCausalLM",
        scoring_func="sigmoid",
        num_nextn_predict_layers=config.num_prediction_layers,
    )


def transformers_differences(config: DeepSeekV3Config) -> list[str]:
    """Return where transformers' own DeepSeek-V3 (5.17 to 5.23) departs from the published definition."""
    return latent.layout_differences(config) + latent.group_differences(config)
