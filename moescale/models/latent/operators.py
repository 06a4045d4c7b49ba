"""The operators of latent attention, and the layers of a model with it. Imports no torch.

Dims beyond those of :mod:`moescale.models.layer_operators`: t the part of a head's query and key with positions, u nope
+ value width, c latent width, d latent width + t, l query latent width.
"""

from __future__ import annotations

from moescale.models.family import LayerList
from moescale.models.latent.config import LatentAttentionConfig
from moescale.models.layer_operators import causal_attention_flops, decoder_dims, decoder_layers
from moescale.operators import Adaptable, Operator, Saved, register


def layers(config: LatentAttentionConfig) -> tuple[LayerList, ...]:
    """Return the operators of a dense and of an MoE layer."""
    query = ("q_proj",) if config.q_lora_rank is None else ("q_down", "q_norm", "q_up")
    return decoder_layers(config, (*query, "kv_down", "kv_norm", "kv_up", "mla_rope", "attention"))


def dims(config: LatentAttentionConfig) -> dict[str, int]:
    """Return the sizes of the dims that do not depend on the batch."""
    return decoder_dims(config) | {
        "q": config.qk_head_dim,
        "t": config.qk_rope_head_dim,
        "v": config.v_head_dim,
        "u": config.qk_nope_head_dim + config.v_head_dim,
        "c": config.kv_lora_rank,
        "d": config.kv_lora_rank + config.qk_rope_head_dim,
        "l": config.q_lora_rank or 0,
    }


def biases(config: LatentAttentionConfig) -> int:
    """Return the biases of one layer's attention projections, which the annotations leave out for their smallness."""
    if not config.attention_bias:
        return 0
    query = config.q_lora_rank or 0
    return query + config.kv_lora_rank + config.qk_rope_head_dim + config.hidden_size


register(
    Operator(
        name="q_down",
        group="attention projections",
        annotation="n h, l h -> n l",
        kind="dense_gemm",
        norm="attention_norm",
        saved=(Saved(name="attention_input", dims="n h", for_weight=True),),
        adaptable=(Adaptable(module="attention.q_down", inputs="h", outputs="l"),),
    )
)
register(
    Operator(
        name="q_norm",
        group="attention projections",
        tp="replicate",
        annotation="n l, l -> n l",
        kind="elementwise",
        saved=(Saved(name="q_latent", dims="n l"), Saved(name="q_rstd", dims="n", itemsize=4)),
    )
)
register(
    Operator(
        name="q_up",
        group="attention projections",
        annotation="n l, a q l -> n a q",
        kind="dense_gemm",
        norm="q_norm",
        saved=(Saved(name="q_latent_normed", dims="n l", for_weight=True),),
        adaptable=(Adaptable(module="attention.q_up", inputs="l", outputs="a q"),),
    )
)
register(
    Operator(
        name="kv_down",
        group="attention projections",
        annotation="n h, d h -> n d",
        kind="dense_gemm",
        norm="attention_norm",
        saved=(Saved(name="attention_input", dims="n h", for_weight=True),),
        adaptable=(Adaptable(module="attention.kv_down", inputs="h", outputs="d"),),
    )
)
register(
    Operator(
        name="kv_norm",
        group="attention projections",
        tp="replicate",
        annotation="n c, c -> n c",
        kind="elementwise",
        saved=(Saved(name="kv_latent", dims="n d"), Saved(name="kv_rstd", dims="n", itemsize=4)),
    )
)
register(
    Operator(
        name="kv_up",
        group="attention projections",
        annotation="n c, a u c -> n a u",
        kind="dense_gemm",
        norm="kv_norm",
        saved=(Saved(name="kv_latent_normed", dims="n c", for_weight=True),),
        adaptable=(Adaptable(module="attention.kv_up", inputs="c", outputs="a u"),),
    )
)
register(
    Operator(
        name="mla_rope",
        group="attention",
        annotation="n a q, n a u, n t -> n a q, n a q",
        kind="elementwise",
    )
)
register(
    Operator(
        name="attention",
        group="attention",
        annotation="n a q, n a q, n a v -> n a v",
        kind="attention",
        flops=causal_attention_flops,
        backward_flops_ratio=2.0,
        saved=(
            Saved(name="q", dims="n a q"),
            Saved(name="k", dims="n a q"),
            Saved(name="v", dims="n a v"),
            Saved(name="mixed", dims="n a v"),
            Saved(name="log_sum_exp", dims="n a", itemsize=4),
        ),
    )
)
