"""config.json of GLM-4.7-Flash and its like. Imports no torch.

Which layers are dense is in ``mlp_layer_types``, by which transformers goes, or in ``first_k_dense_replace``, by which
others go: a folder that has both must say the same in both, and one that has the latter alone must mean one layer,
which is what transformers then takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moescale.errors import ConfigError
from moescale.models.glm4_moe_lite.config import Glm4MoeLiteConfig
from moescale.models.hf_fields import FieldRules, json_type
from moescale.models.latent import hf as latent
from moescale.records import show

RULES = FieldRules(
    only=latent.ONLY | latent.SIGMOID_ROUTING | {"moe_layer_freq": (1, None)},
    required=(*latent.REQUIRED, *latent.REQUIRED_OF_ROUTING),
    integers=latent.INTEGERS | {"num_nextn_predict_layers", "head_dim"},
    numbers=latent.NUMBERS,
    flags=latent.FLAGS,
    others=latent.OTHERS | {"mlp_layer_types"},
    aliases=latent.ALIASES | {"head_dim": "qk_rope_head_dim"},
    absent=latent.ABSENT,
)


def read_hf(document: Mapping[str, Any], path: str) -> Glm4MoeLiteConfig:
    """Translate the fields of a config.json; ``path`` names the file in errors. Raises ConfigError."""
    RULES.check(document, path)
    try:
        first_moe_layer = _first_moe_layer(document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return latent.read_latent(
        Glm4MoeLiteConfig, document, path, RULES, routing_method="noaux_tc", first_moe_layer=first_moe_layer
    )


def write_hf(config: Glm4MoeLiteConfig, dtype: str) -> dict[str, Any]:
    """Return the config.json of a model that has none yet; :func:`read_hf` gives ``config`` back.

    Args:
        dtype: name of the torch dtype of the weights it is written for.
    """
    kinds = ["sparse" if config.is_moe_layer(layer) else "dense" for layer in range(config.num_layers)]
    return latent.write_latent(
        config,
        dtype,
        "Glm4MoeLiteForCausalLM",
        mlp_layer_types=kinds,
        first_k_dense_replace=kinds.count("dense"),
        num_nextn_predict_layers=config.num_prediction_layers,
    )


def transformers_differences(config: Glm4MoeLiteConfig) -> list[str]:
    """Return where transformers (5.17 to 5.23) departs from the published definition of the routing."""
    return latent.layout_differences(config) + latent.group_differences(config)


def _first_moe_layer(document: Mapping[str, Any]) -> int:
    """The number of dense layers, which come first. Raises ConfigError for another order, or two numbers."""
    kinds, dense = document.get("mlp_layer_types"), document.get("first_k_dense_replace")
    if kinds is None:
        if dense not in (None, 1):
            raise ConfigError(
                f"first_k_dense_replace ({dense}) without mlp_layer_types: transformers ignores it and makes one layer "
                f"dense; add mlp_layer_types with {dense} times 'dense' and 'sparse' for the other layers"
            )
        return 1
    if not isinstance(kinds, list) or any(kind not in ("dense", "sparse") for kind in kinds):
        raise ConfigError(
            f"mlp_layer_types ({show(kinds)}) must be a list of 'dense' and 'sparse', not {json_type(kinds)}"
        )
    num_layers = document["num_hidden_layers"]
    if len(kinds) != num_layers:
        raise ConfigError(f"mlp_layer_types has {len(kinds)} entries; it must have num_hidden_layers ({num_layers})")
    first = kinds.count("dense")
    if "sparse" in kinds[:first]:
        raise ConfigError(
            f"mlp_layer_types[{kinds.index('sparse')}] ('sparse') comes before a dense layer, which is not supported"
        )
    if dense not in (None, first):
        raise ConfigError(f"first_k_dense_replace ({dense}) and mlp_layer_types ({first} dense) differ; keep one")
    return first
