"""Frozen configuration: the model's mathematics, and the settings of a training run. Imports no torch.

Field names are moescale's; Hugging Face spellings are translated in :mod:`moescale.convert.hf_config`. What decides
the mathematics of a model has no default, unless it is newer than models that plans and checkpoints were made of.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, ClassVar, Literal

from moescale.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN context extension (Peng et al. 2023, arXiv:2309.00071) as DeepSeek-V2 uses it."""

    factor: float
    """Ratio of the extended to the original context length."""
    original_max_sequence_length: int
    """Context length before the extension, in tokens."""
    beta_fast: float
    """Number of rotations above which a frequency is left as it is."""
    beta_slow: float
    """Number of rotations below which a frequency is divided by ``factor``."""
    mscale: float
    """Numerator's coefficient of the cos/sin scale; see :mod:`moescale.models.blocks.rope`."""
    mscale_all_dim: float
    """Denominator's coefficient of the cos/sin scale, and the softmax scale's coefficient; 0 means neither."""
    truncate: bool = True
    """Round the range of pairs whose frequency is interpolated to whole pairs."""

    def __post_init__(self) -> None:
        for name in ("factor", "original_max_sequence_length", "beta_fast", "beta_slow"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"model.yarn.{name} ({getattr(self, name)}) must be positive and finite")
        for name in ("mscale", "mscale_all_dim"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"model.yarn.{name} ({getattr(self, name)}) must be finite and not negative")
        _check_floats(self, "model.yarn")


_MOST = {"num_layers": 1024, "num_prediction_layers": 64, "num_experts": 4096, "num_shared_experts": 4096}
_LEAST_FLOAT, _MOST_FLOAT = 1e-30, 1e30
"""Of a number that is not 0, either sign: well within fp32, in which models count."""
_MOST_OF_ANY = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What all families share. With a family's own fields it is everything that changes the mathematics."""

    model_type: ClassVar[str]
    """The family, by its name in Hugging Face's config.json."""
    routing_methods: ClassVar[tuple[str, ...]] = ("greedy", "group_limited_greedy")
    """Those of the family."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    dense_intermediate_size: int
    """Intermediate size of the dense layers' feed-forward."""
    expert_intermediate_size: int
    num_experts: int | None
    """Routed experts per MoE layer; None: every layer is dense."""
    num_shared_experts: int
    """0: none. They act as one feed-forward of ``num_shared_experts * expert_intermediate_size``."""
    top_k: int
    first_moe_layer: int
    """Layers with an absolute index below this one are dense."""
    moe_layer_frequency: int
    """From ``first_moe_layer`` on, layers whose absolute index is divisible by this are MoE, the others dense."""
    routing_method: Literal["greedy", "group_limited_greedy", "noaux_tc"]
    """noaux_tc: scores are sigmoids, and a bias per expert, which follows the load, takes part in the choice."""
    num_groups: int
    top_k_groups: int
    normalize_topk: bool
    """With top_k > 1, divide the chosen probabilities by their sum, *instead of* ``routed_scaling_factor``.

    With noaux_tc the scores are divided by their sum *and* multiplied by the factor."""
    routed_scaling_factor: float
    aux_loss_alpha: float
    """Weight of the load-balancing loss; 0 means none."""
    aux_loss_per_sequence: bool
    """Balance each sequence by itself (``seq_aux``), or the micro-batch as a whole."""
    rms_norm_eps: float
    tie_embeddings: bool
    max_sequence_length: int
    """Longest sequence the positional encoding is meant for, in tokens."""
    rope_theta: float
    initializer_std: float
    num_prediction_layers: int = 0
    """Layers for multi-token prediction behind the last one, which a folder may hold: kept for its export, not
    trained."""

    def __post_init__(self) -> None:
        positive = (
            "vocab_size hidden_size num_layers num_heads dense_intermediate_size moe_layer_frequency rope_theta "
            "max_sequence_length initializer_std rms_norm_eps"
        )
        self._check_positive(*positive.split())
        self._check_most()
        if not 0 <= self.aux_loss_alpha < math.inf:
            raise ConfigError(f"model.aux_loss_alpha ({self.aux_loss_alpha}) must not be negative; use 0 for none")
        if not math.isfinite(self.routed_scaling_factor):
            raise ConfigError(f"model.routed_scaling_factor ({self.routed_scaling_factor}) must be finite")
        if self.routing_method not in self.routing_methods:
            raise ConfigError(
                f"model.routing_method ('{self.routing_method}') is not supported; "
                f"use one of {', '.join(self.routing_methods)}"
            )
        if self.num_prediction_layers < 0:
            raise ConfigError(f"model.num_prediction_layers ({self.num_prediction_layers}) must not be negative")
        if self.num_experts is not None:
            self._check_experts(self.num_experts)
        _check_floats(self, "model")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"model.{name} ({getattr(self, name)}) must be positive")

    def _check_most(self) -> None:
        """Refuse numbers that no model has: what they ask for would not be answered, or not be counted in 32 bits."""
        for field in fields(self):
            value, most = getattr(self, field.name), _MOST.get(field.name, _MOST_OF_ANY)
            if isinstance(value, int) and value > most:
                raise ConfigError(f"model.{field.name} ({value}) must be at most {most:,}, more than any model has")

    def _check_experts(self, num_experts: int) -> None:
        if num_experts <= 0:
            raise ConfigError(f"model.num_experts ({num_experts}) must be positive, or None for a dense model")
        if self.expert_intermediate_size <= 0:
            raise ConfigError(f"model.expert_intermediate_size ({self.expert_intermediate_size}) must be positive")
        if self.num_shared_experts < 0 or self.first_moe_layer < 0:
            raise ConfigError(
                f"model.num_shared_experts ({self.num_shared_experts}) and model.first_moe_layer "
                f"({self.first_moe_layer}) must not be negative"
            )
        if not 1 <= self.top_k <= num_experts:
            raise ConfigError(f"model.top_k ({self.top_k}) must be between 1 and model.num_experts ({num_experts})")
        if self.limits_groups:
            if self.num_groups < 1 or num_experts % self.num_groups:
                raise ConfigError(
                    f"model.num_experts ({num_experts}) must be divisible by model.num_groups ({self.num_groups})"
                )
            if not 1 <= self.top_k_groups <= self.num_groups:
                raise ConfigError(
                    f"model.top_k_groups ({self.top_k_groups}) must be between 1 "
                    f"and model.num_groups ({self.num_groups})"
                )
            reachable = num_experts // self.num_groups * self.top_k_groups
            if self.top_k > reachable:
                raise ConfigError(
                    f"model.top_k ({self.top_k}) must not exceed the {reachable} experts that "
                    f"{self.top_k_groups} of {self.num_groups} groups hold"
                )

    @property
    def key_value_width(self) -> int:
        """Elements of a token's keys and values together, over all heads."""
        raise NotImplementedError

    @property
    def limits_groups(self) -> bool:
        """Whether a token's experts come from ``top_k_groups`` of the ``num_groups`` groups."""
        return self.routing_method != "greedy"

    @property
    def has_choice_bias(self) -> bool:
        """Whether routers choose by score plus a bias, which is moved after each step and has no gradient."""
        return self.routing_method == "noaux_tc"

    @property
    def has_router_bias(self) -> bool:
        """Whether routers add a bias per expert to their logits, which is trained."""
        return False

    @property
    def has_expert_biases(self) -> bool:
        """Whether the projections of routed experts have biases."""
        return False

    @property
    def swiglu_clamp(self) -> tuple[float, float] | None:
        """Alpha and limit of the experts' activation where it is clamped; see ``moescale.kernels.swiglu.reference``."""
        return None

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the layer with absolute index ``layer`` routes its tokens to experts."""
        return self.num_experts is not None and layer >= self.first_moe_layer and layer % self.moe_layer_frequency == 0

    @property
    def num_moe_layers(self) -> int:
        return sum(self.is_moe_layer(layer) for layer in range(self.num_layers))

    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of the configuration: equal exactly when the mathematics is.

        A field with a default is newer than the others; it counts only where it differs from its default, which must
        mean what every model meant before. So plans and checkpoints made before it stay those of the same model.
        """
        return fingerprint(_counted(self))


def _check_floats(record: Any, prefix: str) -> None:
    """Refuse numbers that fp32 turns into infinity or 0, or may when it counts with them."""
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, float) and value and not _LEAST_FLOAT <= abs(value) <= _MOST_FLOAT:
            raise ConfigError(
                f"{prefix}.{field.name} ({value}) must be between {_LEAST_FLOAT:g} and {_MOST_FLOAT:g}: models "
                "count in fp32"
            )


def _counted(config: Any) -> dict[str, Any]:
    """Return the fields of a configuration that its fingerprint counts."""
    values = {field: getattr(config, field.name) for field in fields(config)}
    return {
        field.name: _counted(value) if is_dataclass(value) else value
        for field, value in values.items()
        if field.default is MISSING or value != field.default
    }


def fingerprint(value: object) -> str:
    """First 16 hex digits of the SHA-256 of ``value`` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
