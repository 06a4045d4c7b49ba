"""A DeepSeek-V2 model's config.json and the names of its tensors in a Hugging Face folder. Imports no torch.

Both spellings are read: the published one (``auto_map``, ``rope_scaling``, ``torch_dtype``) and that of transformers 5
(``rope_parameters``, ``dtype``). Every field is either translated, checked against the one value that is supported, or
known not to touch the mathematics of training; any other is an error, because ignoring it could train another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moescale.config import YarnConfig
from moescale.errors import ConfigError, nearest
from moescale.models.deepseek_v2.config import DeepSeekV2Config
from moescale.models.family import HfNames
from moescale.models.hf_fields import CLOSE, is_harmless, json_type, wrong_integer, wrong_number
from moescale.records import show

NAMES = HfNames(
    outside_layers={
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    },
    layer_prefix="model.layers.{layer}.",
    whole={
        "attention_norm": "input_layernorm",
        "attention.q_proj": "self_attn.q_proj",
        "attention.q_down": "self_attn.q_a_proj",
        "attention.q_norm": "self_attn.q_a_layernorm",
        "attention.q_up": "self_attn.q_b_proj",
        "attention.kv_down": "self_attn.kv_a_proj_with_mqa",
        "attention.kv_norm": "self_attn.kv_a_layernorm",
        "attention.kv_up": "self_attn.kv_b_proj",
        "attention.output": "self_attn.o_proj",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.router": "mlp.gate",
        "feed_forward.down": "mlp.down_proj",
        "feed_forward.shared_experts.down": "mlp.shared_experts.down_proj",
    },
    gate_and_up={
        "feed_forward.gate_up": "mlp",
        "feed_forward.shared_experts.gate_up": "mlp.shared_experts",
    },
    experts="mlp.experts",
)

# Fields with one supported value, each with the values that mean it.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "scoring_func": ("softmax",),
    "attention_dropout": (0, 0.0, None),
    "hidden_dropout": (0, 0.0, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "num_nextn_predict_layers": (0, None),
    "rope_interleave": (True, None),
    "is_encoder_decoder": (False, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, 1.0, None),
    "use_mla": (True, None),
}
_YARN_FIELDS = frozenset(
    "type rope_type factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim "
    "rope_theta".split()
)
_REQUIRED = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads kv_lora_rank qk_nope_head_dim qk_rope_head_dim "
    "v_head_dim intermediate_size max_position_embeddings"
).split()
_INTEGERS = frozenset(_REQUIRED) | frozenset(
    "num_key_value_heads q_lora_rank moe_intermediate_size n_routed_experts n_shared_experts num_experts_per_tok "
    "first_k_dense_replace moe_layer_freq n_group topk_group num_local_experts num_experts".split()
)
_NUMBERS = frozenset(
    "routed_scaling_factor aux_loss_alpha router_aux_loss_coef rms_norm_eps rope_theta initializer_range".split()
)
_FLAGS = frozenset("attention_bias norm_topk_prob seq_aux tie_word_embeddings".split())
_TRANSLATED = _INTEGERS | _NUMBERS | _FLAGS | frozenset("model_type topk_method rope_scaling rope_parameters".split())
FIELDS = _TRANSLATED | _ONLY.keys()
"""What decides what is trained."""
# Other names of a field, which must agree with it where both are given.
_ALIASES = {
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "router_aux_loss_coef": "aux_loss_alpha",
}


def read_hf(document: Mapping[str, Any], path: str) -> DeepSeekV2Config:
    """Translate the fields of a config.json; ``path`` names the file in errors. Raises ConfigError."""
    _check_fields(document, path)
    _check_values(document, path)
    for name in _REQUIRED:
        if document.get(name) is None:
            raise ConfigError(f"{path}: field '{name}' is missing; it decides the shape of the model")
    num_heads = document["num_attention_heads"]
    if document.get("num_key_value_heads", num_heads) not in (num_heads, None):
        raise ConfigError(
            f"{path}: num_key_value_heads ({document['num_key_value_heads']}) must equal num_attention_heads "
            f"({num_heads}): latent attention has no grouped heads"
        )

    def field(name: str, default: Any) -> Any:
        value = document.get(name)
        return default if value is None else value

    num_experts = document.get("n_routed_experts")
    if num_experts is not None:
        for name in ("num_experts_per_tok", "moe_intermediate_size"):
            if document.get(name) is None:
                raise ConfigError(f"{path}: field '{name}' is missing, n_routed_experts is {num_experts}")
    values = dict(
        vocab_size=document["vocab_size"],
        hidden_size=document["hidden_size"],
        num_layers=document["num_hidden_layers"],
        num_heads=num_heads,
        q_lora_rank=document.get("q_lora_rank"),
        kv_lora_rank=document["kv_lora_rank"],
        qk_nope_head_dim=document["qk_nope_head_dim"],
        qk_rope_head_dim=document["qk_rope_head_dim"],
        v_head_dim=document["v_head_dim"],
        attention_bias=field("attention_bias", False),
        dense_intermediate_size=document["intermediate_size"],
        expert_intermediate_size=field("moe_intermediate_size", 0),
        num_experts=num_experts,
        num_shared_experts=field("n_shared_experts", 0),
        top_k=field("num_experts_per_tok", 0),
        first_moe_layer=field("first_k_dense_replace", 0),
        moe_layer_frequency=field("moe_layer_freq", 1),
        routing_method=field("topk_method", "greedy"),
        num_groups=field("n_group", 1),
        top_k_groups=field("topk_group", 1),
        normalize_topk=field("norm_topk_prob", False),
        routed_scaling_factor=float(field("routed_scaling_factor", 1.0)),
        aux_loss_alpha=float(field("aux_loss_alpha", 0.0)),
        aux_loss_per_sequence=field("seq_aux", True),
        rms_norm_eps=float(field("rms_norm_eps", 1e-6)),
        tie_embeddings=field("tie_word_embeddings", False),
        max_sequence_length=document["max_position_embeddings"],
        initializer_std=float(field("initializer_range", 0.02)),
    )
    try:
        rope_theta, yarn = _positions(document)
        return DeepSeekV2Config(**values, rope_theta=rope_theta, yarn=yarn)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def write_hf(config: DeepSeekV2Config, dtype: str) -> dict[str, Any]:
    """The config.json of a model that has none yet; :func:`read_hf` gives ``config`` back.

    Args:
        dtype: name of the torch dtype of the weights beside it.
    """
    rope_scaling = None
    if config.yarn is not None:
        rope_scaling = {
            "type": "yarn",
            "factor": config.yarn.factor,
            "original_max_position_embeddings": config.yarn.original_max_sequence_length,
            "beta_fast": config.yarn.beta_fast,
            "beta_slow": config.yarn.beta_slow,
            "mscale": config.yarn.mscale,
            "mscale_all_dim": config.yarn.mscale_all_dim,
        }
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "attention_bias": config.attention_bias,
        "intermediate_size": config.dense_intermediate_size,
        "moe_intermediate_size": config.expert_intermediate_size,
        "n_routed_experts": config.num_experts,
        "n_shared_experts": config.num_shared_experts or None,
        "num_experts_per_tok": config.top_k,
        "first_k_dense_replace": config.first_moe_layer,
        "moe_layer_freq": config.moe_layer_frequency,
        "topk_method": config.routing_method,
        "n_group": config.num_groups,
        "topk_group": config.top_k_groups,
        "norm_topk_prob": config.normalize_topk,
        "routed_scaling_factor": config.routed_scaling_factor,
        "scoring_func": "softmax",
        "aux_loss_alpha": config.aux_loss_alpha,
        "seq_aux": config.aux_loss_per_sequence,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_std,
        "max_position_embeddings": config.max_sequence_length,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_scaling,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
    }


def transformers_differences(config: DeepSeekV2Config) -> list[str]:
    """Where transformers' own DeepSeek-V2 (5.17 to 5.23) departs from the published definition for this model."""
    found = []
    if config.num_experts is not None and config.normalize_topk and config.top_k > 1:
        found.append("norm_topk_prob is true: transformers ignores it and applies routed_scaling_factor instead")
    if config.num_experts is not None and config.moe_layer_frequency != 1:
        found.append(
            f"moe_layer_freq is {config.moe_layer_frequency}: transformers ignores it and expects experts in every "
            "layer from first_k_dense_replace on"
        )
    if config.num_experts is not None and config.num_shared_experts == 0:
        found.append("n_shared_experts is null: transformers refuses such a model")
    if config.yarn is not None and config.yarn.mscale_all_dim == 0 and config.yarn.mscale != 0:
        found.append("mscale_all_dim is 0: transformers then ignores mscale too")
    return found


def _check_fields(document: Mapping[str, Any], path: str) -> None:
    for name, supported in _ONLY.items():
        if name in document and document[name] not in supported:
            raise ConfigError(f"{path}: {name} ({show(document[name])}) is not supported; it must be {supported[0]!r}")
    unknown = [name for name, value in document.items() if name not in FIELDS and not is_harmless(name, value)]
    if unknown:
        name = unknown[0]
        raise ConfigError(
            f"{path}: field '{name}' ({show(document[name])}) is not known and may change the mathematics of the "
            f"model{nearest(name, FIELDS, cutoff=CLOSE)}; if it does not, pass --ignore-config-field {name}"
        )


def _check_values(document: Mapping[str, Any], path: str) -> None:
    for name, value in document.items():
        problem = _wrong_type(name, value)
        if problem:
            raise ConfigError(f"{path}: {name} ({show(value)}) {problem}")
    for alias, name in _ALIASES.items():
        # An absent aux_loss_alpha means 0, which a coefficient under the other name contradicts.
        value = document.get(name)
        value = 0 if value is None and name == "aux_loss_alpha" else value
        if document.get(alias) is not None and document[alias] != value:
            raise ConfigError(
                f"{path}: {alias} ({show(document[alias])}) and {name} ({show(document.get(name))}) differ; {name} "
                f"is the one that counts: set it, and remove {alias}"
            )


def _wrong_type(name: str, value: Any) -> str | None:
    """What is wrong with a field's value by itself, or None; null stands for an absent field."""
    if value is None:
        return None
    if name in _FLAGS and not isinstance(value, bool):
        return f"must be true or false, not {json_type(value)}"
    if name in _INTEGERS:
        return wrong_integer(value) or ("must not be negative" if value < 0 else None)
    if name in _NUMBERS:
        return wrong_number(value)
    if name == "topk_method" and not isinstance(value, str):
        return f"must be a text, not {json_type(value)}"
    return None


def _positions(document: Mapping[str, Any]) -> tuple[float, YarnConfig | None]:
    """RoPE's base and YaRN's parameters, from ``rope_parameters`` (transformers 5) and the older two fields.

    Where a folder has both spellings, readers differ in which one they believe, so both must say the same.
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
        found[name] = _yarn(scaling, name)
    given = {name: float(theta) for name, theta in thetas.items() if theta is not None}
    for name, theta in given.items():
        first = next(iter(given))
        if theta != given[first]:
            raise ConfigError(f"{first} ({given[first]}) and {name} ({theta}) differ; keep one")
    if len(found) == 2 and found["rope_parameters"] != found["rope_scaling"]:
        raise ConfigError("rope_parameters and rope_scaling describe different positions; keep one")
    return next(iter(given.values()), 10000.0), next(iter(found.values()), None)


def _yarn(scaling: Mapping[str, Any], name: str) -> YarnConfig | None:
    """YaRN's parameters, or None for plain RoPE."""
    kinds = {key: scaling[key] for key in ("rope_type", "type") if scaling.get(key) is not None}
    if len(kinds) == 2 and kinds["rope_type"] != kinds["type"]:
        raise ConfigError(
            f"{name}.rope_type ({show(kinds['rope_type'])}) and {name}.type ({show(kinds['type'])}) differ"
        )
    if not kinds:
        other = next((key for key, value in scaling.items() if key != "rope_theta" and value is not None), None)
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
    unknown = [key for key in scaling if key not in _YARN_FIELDS and scaling[key] is not None]
    if unknown:
        raise ConfigError(f"{name}.{unknown[0]} ({show(scaling[unknown[0]])}) is not supported; remove it")
    for key in ("factor", "original_max_position_embeddings"):
        if scaling.get(key) is None:
            raise ConfigError(f"{name}.{key} is missing")
    original = scaling["original_max_position_embeddings"]
    problem = wrong_integer(original)
    if problem:
        raise ConfigError(f"{name}.original_max_position_embeddings ({show(original)}) {problem}")

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
    )


def _scaling_number(scaling: Mapping[str, Any], name: str, key: str) -> float | None:
    value = scaling.get(key)
    if value is None:
        return None
    problem = wrong_number(value)
    if problem:
        raise ConfigError(f"{name}.{key} ({show(value)}) {problem}")
    return float(value)
