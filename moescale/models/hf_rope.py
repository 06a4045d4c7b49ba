"""Rotary positions in a Hugging Face config.json: RoPE's base and YaRN, in both spellings. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moescale.config import YarnConfig
from moescale.errors import ConfigError
from moescale.models.hf_fields import json_type, wrong_integer, wrong_number
from moescale.records import show

_PLAIN_FIELDS = frozenset({"rope_theta", "partial_rotary_factor"})
_YARN_FIELDS = _PLAIN_FIELDS | frozenset(
    "type rope_type factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim".split()
)


def write_yarn(yarn: YarnConfig | None) -> dict[str, Any] | None:
    """Return ``rope_scaling``, from which :func:`read_positions` reads ``yarn`` again."""
    if yarn is None:
        return None
    return {
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_sequence_length,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    } | ({} if yarn.truncate else {"truncate": False})


def read_half_split_positions(document: Mapping[str, Any], theta: float = 10000.0) -> tuple[float, YarnConfig | None]:
    """As :func:`read_positions` for models whose YaRN scales cosine and sine by the factor alone.

    transformers takes DeepSeek's two coefficients into account in these models only if both are there.
    """
    theta, yarn = read_positions(document, theta, has_truncate=True)
    if yarn is not None and (yarn.mscale, yarn.mscale_all_dim) != (1.0, 0.0):
        raise ConfigError(
            f"mscale ({yarn.mscale}) and mscale_all_dim ({yarn.mscale_all_dim}) of YaRN are not supported; remove them"
        )
    return theta, yarn


def write_half_split_yarn(yarn: YarnConfig | None) -> dict[str, Any] | None:
    """Return ``rope_scaling`` without DeepSeek's coefficients, which those models do not have."""
    written = write_yarn(yarn)
    if written is None:
        return None
    return {"rope_type": "yarn"} | {k: v for k, v in written.items() if k not in ("type", "mscale", "mscale_all_dim")}


def read_positions(
    document: Mapping[str, Any], theta: float = 10000.0, *, has_truncate: bool = False
) -> tuple[float, YarnConfig | None]:
    """Return RoPE's base and YaRN's parameters, from ``rope_parameters`` (transformers 5) and the older two fields.

    ``theta`` is the base where a folder gives none. Where it has both spellings, readers differ in which one they
    believe, so both must say the same. ``has_truncate``: whether the family's YaRN knows ``truncate``.
    Raises ConfigError.
    """
    thetas = {"rope_theta": document.get("rope_theta")}
    found: dict[str, YarnConfig | None] = {}
    for name in ("rope_parameters", "rope_scaling"):
        scaling = document.get(name)
        if scaling is None:
            continue
        if not isinstance(scaling, Mapping):
            raise ConfigError(f"{name} ({show(scaling)}) must be an object, not {json_type(scaling)}")
        thetas[f"{name}.rope_theta"] = _scaling_number(scaling, name, "rope_theta")
        found[name] = _yarn(scaling, name, _YARN_FIELDS | {"truncate"} if has_truncate else _YARN_FIELDS)
    given = {name: float(theta) for name, theta in thetas.items() if theta is not None}
    for name, theta in given.items():
        first = next(iter(given))
        if theta != given[first]:
            raise ConfigError(f"{first} ({given[first]}) and {name} ({theta}) differ; keep one")
    if len(found) == 2 and found["rope_parameters"] != found["rope_scaling"]:
        raise ConfigError("rope_parameters and rope_scaling describe different positions; keep one")
    return next(iter(given.values()), theta), next(iter(found.values()), None)


def _yarn(scaling: Mapping[str, Any], name: str, fields: frozenset[str]) -> YarnConfig | None:
    """YaRN's parameters, or None for plain RoPE."""
    if scaling.get("partial_rotary_factor") not in (1, None):
        raise ConfigError(
            f"{name}.partial_rotary_factor ({show(scaling['partial_rotary_factor'])}) is not supported; it must be 1"
        )
    kinds = {key: scaling[key] for key in ("rope_type", "type") if scaling.get(key) is not None}
    if len(kinds) == 2 and kinds["rope_type"] != kinds["type"]:
        raise ConfigError(
            f"{name}.rope_type ({show(kinds['rope_type'])}) and {name}.type ({show(kinds['type'])}) differ"
        )
    if not kinds:
        other = next((key for key, value in scaling.items() if key not in _PLAIN_FIELDS and value is not None), None)
        if other is not None:
            raise ConfigError(
                f"{name}.rope_type is missing beside {name}.{other} ({show(scaling[other])}); "
                f"it must be yarn, or {name} null"
            )
        return None
    key, kind = next(iter(kinds.items()))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigError(f"{name}.{key} ({show(kind)}) is not supported; it must be yarn, or {name} null")
    unknown = [key for key in scaling if key not in fields and scaling[key] is not None]
    if unknown:
        raise ConfigError(f"{name}.{unknown[0]} ({show(scaling[unknown[0]])}) is not supported; remove it")
    for key in ("factor", "original_max_position_embeddings"):
        if scaling.get(key) is None:
            raise ConfigError(f"{name}.{key} is missing")
    original = scaling["original_max_position_embeddings"]
    problem = wrong_integer(original)
    if problem:
        raise ConfigError(f"{name}.original_max_position_embeddings ({show(original)}) {problem}")

    truncate = scaling.get("truncate")
    if truncate is not None and not isinstance(truncate, bool):
        raise ConfigError(f"{name}.truncate ({show(truncate)}) must be true or false, not {json_type(truncate)}")

    def number(key: str, default: float) -> float:
        value = _scaling_number(scaling, name, key)
        return default if value is None else value

    return YarnConfig(
        factor=number("factor", 1.0),
        original_max_sequence_length=original,
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        mscale=number("mscale", 1.0),
        mscale_all_dim=number("mscale_all_dim", 0.0),
        truncate=truncate is not False,
    )


def _scaling_number(scaling: Mapping[str, Any], name: str, key: str) -> float | None:
    value = scaling.get(key)
    if value is None:
        return None
    problem = wrong_number(value)
    if problem:
        raise ConfigError(f"{name}.{key} ({show(value)}) {problem}")
    return float(value)
