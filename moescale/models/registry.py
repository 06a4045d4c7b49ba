"""The families there are. A new one is a folder and a line here. Imports no torch."""

from __future__ import annotations

from moescale.config import ModelConfig
from moescale.errors import ConfigError, nearest
from moescale.models import deepseek_v2, deepseek_v3, glm4_moe_lite, gpt_oss, olmoe, qwen3_moe
from moescale.models.family import Family
from moescale.records import show

FAMILIES = {
    family.model_type: family
    for family in (
        *(deepseek_v2.FAMILY, deepseek_v3.FAMILY, glm4_moe_lite.FAMILY, gpt_oss.FAMILY, olmoe.FAMILY),
        qwen3_moe.FAMILY,
    )
}


def find_family(model_type: object) -> Family:
    """Return the family of a config.json's ``model_type``. Raises ConfigError where there is none."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = " or ".join(repr(name) for name in sorted(FAMILIES))
        raise ConfigError(
            f"model_type ({show(model_type)}) is not supported; it must be {known}{nearest(str(model_type), FAMILIES)}"
        )
    return FAMILIES[model_type]


def family_of(config: ModelConfig) -> Family:
    """Return the family that ``config`` is a configuration of."""
    return find_family(config.model_type)
