"""config.json of a family with latent attention, and the names of its tensors. Imports no torch.

Both spellings are read: the published one (``auto_map``, ``rope_scaling``, ``torch_dtype``) and that of transformers 5
(``rope_parameters``, ``dtype``). A family adds what it supports of the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

from moescale.errors import ConfigError
from moescale.models.family import HfNames
from moescale.models.hf_fields import FieldRules, value_or
from moescale.models.hf_rope import read_positions, write_yarn
from moescale.models.latent.config import LatentAttentionConfig

NAMES = HfNames(
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
    tensors={"feed_forward.router.choice_bias": "mlp.gate.e_score_correction_bias"},
)

# Fields with one supported value, each with the values that mean it.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, 0.0, None),
    "hidden_dropout": (0, 0.0, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "rope_interleave": (True, None),
    "is_encoder_decoder": (False, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, 1.0, None),
    "use_mla": (True, None),
}
REQUIRED = tuple(
    "vocab_size hidden_size num_hidden_layers num_attention_heads kv_lora_rank qk_nope_head_dim qk_rope_head_dim "
    "v_head_dim intermediate_size max_position_embeddings".split()
)
INTEGERS = frozenset(REQUIRED) | frozenset(
    "num_key_value_heads q_lora_rank moe_intermediate_size n_routed_experts n_shared_experts num_experts_per_tok "
    "first_k_dense_replace moe_layer_freq n_group topk_group num_local_experts num_experts".split()
)
NUMBERS = frozenset(
    "routed_scaling_factor aux_loss_alpha router_aux_loss_coef rms_norm_eps rope_theta initializer_range".split()
)
FLAGS = frozenset("attention_bias norm_topk_prob seq_aux tie_word_embeddings".split())
OTHERS = frozenset("model_type rope_scaling rope_parameters".split())
ALIASES = {
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "router_aux_loss_coef": "aux_loss_alpha",
}
ABSENT = {"aux_loss_alpha": 0}
# Of families whose routers choose by sigmoid and bias.
SIGMOID_ROUTING: dict[str, tuple[Any, ...]] = {"scoring_func": ("sigmoid", None), "topk_method": ("noaux_tc", None)}
REQUIRED_OF_ROUTING = tuple(
    "n_routed_experts num_experts_per_tok moe_intermediate_size n_group topk_group norm_topk_prob "
    "routed_scaling_factor".split()
)
PREDICTION_LAYERS = {"num_mtp_layers": "num_nextn_predict_layers"}
"""The other name that transformers 5 knows of the number of multi-token-prediction layers."""

Config = TypeVar("Config", bound=LatentAttentionConfig)


def read_latent(kind: type[Config], document: Mapping[str, Any], path: str, rules: FieldRules, **values: Any) -> Config:
    """Translate the fields of a config.json that all these families have. Raises ConfigError.

    Args:
        path: of the file, in errors.
        values: fields of ``kind`` that the family has read itself, or which it has only one value of.
    """
    rules.check(document, path)
    num_heads = document["num_attention_heads"]
    if document.get("num_key_value_heads", num_heads) not in (num_heads, None):
        raise ConfigError(
            f"{path}: num_key_value_heads ({document['num_key_value_heads']}) must equal num_attention_heads "
            f"({num_heads}): latent attention has no grouped heads"
        )

    field = partial(value_or, document)
    num_experts = document.get("n_routed_experts")
    if num_experts is not None:
        for name in ("num_experts_per_tok", "moe_intermediate_size"):
            if document.get(name) is None:
                raise ConfigError(f"{path}: field '{name}' is missing, n_routed_experts is {num_experts}")
    read = dict(
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
        num_prediction_layers=field("num_nextn_predict_layers", 0),
    )
    try:
        rope_theta, yarn = read_positions(document)
        return kind(**(read | dict(rope_theta=rope_theta, yarn=yarn) | values))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def write_latent(config: LatentAttentionConfig, dtype: str, architecture: str, **fields: Any) -> dict[str, Any]:
    """Return the config.json of a model that has none yet, from which :func:`read_latent` gives ``config`` back.

    Args:
        dtype: name of the torch dtype of the weights it is written for.
        architecture: name of the class that opens the folder.
        fields: those of the family alone.
    """
    return {
        "architectures": [architecture],
        "model_type": config.model_type,
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
        "aux_loss_alpha": config.aux_loss_alpha,
        "seq_aux": config.aux_loss_per_sequence,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_std,
        "max_position_embeddings": config.max_sequence_length,
        "rope_theta": config.rope_theta,
        "rope_scaling": write_yarn(config.yarn),
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
    } | fields


def layout_differences(config: LatentAttentionConfig) -> list[str]:
    """Return where transformers' classes of these families (5.17 to 5.23) depart from the definition they share."""
    found = []
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


def group_differences(config: LatentAttentionConfig) -> list[str]:
    """Return where transformers' routers that score a group by its two best experts depart from the definition."""
    if config.num_experts is not None and config.num_experts == config.num_groups:
        return [f"n_group is {config.num_groups}: transformers fails on groups of a single expert"]
    return []
