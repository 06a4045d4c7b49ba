"""A gpt-oss model's config.json and the names of its tensors in a Hugging Face folder. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from moescale.errors import ConfigError
from moescale.models.family import HfNames
from moescale.models.gpt_oss.config import GptOssConfig
from moescale.models.grouped.hf import read_shared, write_shared
from moescale.models.hf_fields import FieldRules, value_or
from moescale.models.hf_rope import read_half_split_positions, write_half_split_yarn
from moescale.models.hf_routing import read_aux_loss
from moescale.records import show

NAMES = HfNames(
    whole={
        "attention_norm": "input_layernorm",
        "attention.q_proj": "self_attn.q_proj",
        "attention.k_proj": "self_attn.k_proj",
        "attention.v_proj": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.router": "mlp.router",
    },
    gate_and_up={},
    experts="mlp.experts",
    tensors={"attention.sinks": "self_attn.sinks"},
    experts_are_stacked=True,
)
_SLIDING, _FULL = "sliding_attention", "full_attention"
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, 0.0, None),
    "is_encoder_decoder": (False, None),
}
_REQUIRED = tuple(
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
    "num_local_experts num_experts_per_tok max_position_embeddings sliding_window".split()
)
RULES = FieldRules(
    only=_ONLY,
    required=_REQUIRED,
    integers=frozenset(_REQUIRED) | {"num_experts", "experts_per_token", "initial_context_length"},
    numbers=frozenset(
        "rms_norm_eps rope_theta initializer_range router_aux_loss_coef swiglu_alpha swiglu_limit".split()
    ),
    flags=frozenset({"attention_bias", "tie_word_embeddings", "output_router_logits"}),
    others=frozenset({"model_type", "rope_parameters", "rope_scaling", "layer_types", "quantization_config"}),
    aliases={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
)


def read_hf(document: Mapping[str, Any], path: str) -> GptOssConfig:
    """Translate the fields of a config.json; ``path`` names the file in errors. Raises ConfigError."""
    RULES.check(document, path)

    field = partial(value_or, document)
    try:
        _check_quantization(document.get("quantization_config"))
        if document.get("rope_parameters") is None and document.get("rope_scaling") is None:
            # Readers differ: transformers takes the YaRN of the published models, others take none.
            raise ConfigError("rope_scaling is missing; it must be yarn, or an object with rope_type default")
        rope_theta, yarn = read_half_split_positions(document, 150000.0)
        _check_initial_context(document, None if yarn is None else yarn.original_max_sequence_length)
        return GptOssConfig(
            num_key_value_heads=document["num_key_value_heads"],
            head_dim=document["head_dim"],
            attention_bias=field("attention_bias", True),
            window=document["sliding_window"],
            windowed_layers=_windowed_layers(document),
            dense_intermediate_size=document["intermediate_size"],
            expert_intermediate_size=document["intermediate_size"],
            swiglu_alpha=float(field("swiglu_alpha", 1.702)),
            swiglu_limit=float(field("swiglu_limit", 7.0)),
            num_experts=document["num_local_experts"],
            normalize_topk=True,  # which makes the softmax over all experts one over the chosen
            aux_loss_alpha=read_aux_loss(document, 0.001),
            **read_shared(document),
            rms_norm_eps=float(field("rms_norm_eps", 1e-5)),
            rope_theta=rope_theta,
            yarn=yarn,
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def write_hf(config: GptOssConfig, dtype: str) -> dict[str, Any]:
    """Return the config.json of a model that has none yet; :func:`read_hf` gives ``config`` back."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "torch_dtype": dtype,
        **write_shared(config),
        "head_dim": config.head_dim,
        "attention_bias": config.attention_bias,
        "sliding_window": config.window,
        "layer_types": [_SLIDING if layer in config.windowed_layers else _FULL for layer in range(config.num_layers)],
        "intermediate_size": config.expert_intermediate_size,
        "swiglu_alpha": config.swiglu_alpha,
        "swiglu_limit": config.swiglu_limit,
        "num_local_experts": config.num_experts,
        # Without it, transformers takes the YaRN of the published models.
        "rope_scaling": write_half_split_yarn(config.yarn) or {"rope_type": "default"},
    }


def _check_quantization(quantization: Any) -> None:
    """Experts in MXFP4 are read as bf16; of other formats nothing is known."""
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    if method != "mxfp4":
        raise ConfigError(f"quantization_config.quant_method ({show(method)}) is not supported; it must be mxfp4")


def _check_initial_context(document: Mapping[str, Any], original: int | None) -> None:
    given = document.get("initial_context_length")
    if given is not None and original is not None and given != original:
        raise ConfigError(
            f"initial_context_length ({given}) and original_max_position_embeddings ({original}) of YaRN differ; "
            "keep the latter"
        )


def _windowed_layers(document: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers with a window; without ``layer_types`` every other one, from the first on."""
    num_layers, types = document["num_hidden_layers"], document.get("layer_types")
    if types is None:
        return tuple(range(0, num_layers, 2))
    if not isinstance(types, list) or len(types) != num_layers:
        raise ConfigError(f"layer_types ({show(types)}) must be a list of num_hidden_layers ({num_layers}) texts")
    for layer, kind in enumerate(types):
        if kind not in (_SLIDING, _FULL):
            raise ConfigError(f"layer_types[{layer}] ({show(kind)}) is not supported; it must be {_SLIDING} or {_FULL}")
    return tuple(layer for layer, kind in enumerate(types) if kind == _SLIDING)
