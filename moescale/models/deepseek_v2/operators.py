"""The operators of a DeepSeek-V2 model, by kind of layer. Imports no torch.

Tests hold their parameters, FLOPs and saved bytes to the real model.
"""

from __future__ import annotations

from moescale.models.deepseek_v2.config import DeepSeekV2Config
from moescale.models.family import LayerList
from moescale.operators import Dims, Operator, Recompute, Saved, register

_ATTENTION_START = ("attention_norm",)
_ATTENTION_END = ("kv_down", "kv_norm", "kv_up", "mla_rope", "attention", "attention_output", "feed_forward_norm")


def layers(config: DeepSeekV2Config) -> tuple[LayerList, ...]:
    """Return the operators of a dense and of an MoE layer."""
    query = ("q_proj",) if config.q_lora_rank is None else ("q_down", "q_norm", "q_up")
    attention = (*_ATTENTION_START, *query, *_ATTENTION_END)
    shared = ("shared_gate_up", "shared_swiglu", "shared_down") if config.num_shared_experts else ()
    dense = (*attention, "dense_gate_up", "dense_swiglu", "dense_down", "residual")
    moe = (*attention, "router", "experts", "expert_gather_combine", *shared, "residual")
    return (
        LayerList(name="dense", operators=dense, count=config.num_layers - config.num_moe_layers),
        LayerList(name="moe", operators=moe, count=config.num_moe_layers),
    )


def outside(config: DeepSeekV2Config) -> tuple[str, ...]:
    """Return the operators that are in no layer."""
    return ("embedding", "final_norm", "linear_cross_entropy")


def dims(config: DeepSeekV2Config) -> dict[str, int]:
    """Sizes of the dims that do not depend on the batch; see the legend above."""
    return {
        "h": config.hidden_size,
        "a": config.num_heads,
        "q": config.qk_head_dim,
        "t": config.qk_rope_head_dim,
        "v": config.v_head_dim,
        "u": config.qk_nope_head_dim + config.v_head_dim,
        "c": config.kv_lora_rank,
        "d": config.kv_lora_rank + config.qk_rope_head_dim,
        "l": config.q_lora_rank or 0,
        "e": config.num_experts or 0,
        "k": config.top_k,
        "f": config.expert_intermediate_size,
        "s": config.num_shared_experts * config.expert_intermediate_size,
        "i": config.dense_intermediate_size,
        "w": config.vocab_size,
    }


def biases(config: DeepSeekV2Config) -> int:
    """Biases of one layer's attention projections, which the annotations leave out for their smallness."""
    if not config.attention_bias:
        return 0
    query = config.q_lora_rank or 0
    return query + config.kv_lora_rank + config.qk_rope_head_dim + config.hidden_size


# Dims: n tokens, h hidden, a heads, q query-key width of a head, t its part with positions, v value width of a head,
# u nope + value width, c latent width, d latent width + t, l query latent width, e experts, k experts per token,
# f expert intermediate size, s shared experts' intermediate size, i dense intermediate size, w vocabulary, x sequence
# length, b sequences.


def _attention_flops(dims: Dims) -> float:
    """Return the FLOPs of two GEMMs over the causal half of the square."""
    return dims["n"] * dims["a"] * dims["x"] * (dims["q"] + dims["v"])


register(
    Operator(
        name="attention_norm",
        group="norms and residuals",
        tp="replicate",
        annotation="n h, h -> n h",
        kind="elementwise",
        saved=(Saved(name="x", dims="n h"), Saved(name="attention_rstd", dims="n", itemsize=4)),
    )
)
register(
    Operator(
        name="q_proj",
        group="attention projections",
        annotation="n h, a q h -> n a q",
        kind="dense_gemm",
        saved=(Saved(name="attention_input", dims="n h"),),
    )
)
register(
    Operator(
        name="q_down",
        group="attention projections",
        annotation="n h, l h -> n l",
        kind="dense_gemm",
        saved=(Saved(name="attention_input", dims="n h"),),
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
        saved=(Saved(name="q_latent_normed", dims="n l"),),
    )
)
register(
    Operator(
        name="kv_down",
        group="attention projections",
        annotation="n h, d h -> n d",
        kind="dense_gemm",
        saved=(Saved(name="attention_input", dims="n h"),),
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
        saved=(Saved(name="kv_latent_normed", dims="n c"),),
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
        flops=_attention_flops,
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
register(
    Operator(
        name="attention_output",
        group="attention projections",
        annotation="n a v, h a v -> n h",
        kind="dense_gemm",
        saved=(Saved(name="mixed", dims="n a v"),),
    )
)
register(
    Operator(
        name="feed_forward_norm",
        group="norms and residuals",
        tp="replicate",
        annotation="n h, n h, h -> n h, n h",
        kind="elementwise",
        saved=(Saved(name="x_middle", dims="n h"), Saved(name="feed_forward_rstd", dims="n", itemsize=4)),
    )
)
register(
    Operator(
        name="dense_gate_up",
        group="dense layers",
        annotation="n h, 2i h -> n 2i",
        kind="dense_gemm",
        saved=(Saved(name="feed_forward_input", dims="n h"),),
    )
)
register(
    Operator(
        name="dense_swiglu",
        group="dense layers",
        annotation="n 2i -> n i",
        kind="elementwise",
        saved=(Saved(name="dense_gate_up", dims="n 2i"),),
    )
)
register(
    Operator(
        name="dense_down",
        group="dense layers",
        annotation="n i, h i -> n h",
        kind="dense_gemm",
        saved=(Saved(name="dense_activation", dims="n i"),),
    )
)
register(
    Operator(
        name="router",
        group="router",
        annotation="n h, e h -> n e",
        kind="dense_gemm",
        saved=(
            Saved(name="feed_forward_input", dims="n h"),
            Saved(name="router_logits", dims="n e", itemsize=4),
            Saved(name="topk_ids", dims="n k", itemsize=4),
            Saved(name="topk_weights", dims="n k", itemsize=4),
            Saved(name="tokens_per_sequence_expert", dims="b e", itemsize=4),
        ),
    )
)
register(
    Operator(
        name="experts",
        group="experts",
        # Gate and up, without down.
        recompute=Recompute(drops=("expert_pre_activation",), forward_share=2 / 3),
        annotation="n h, e 2f h, e h f -> n h",
        kind="grouped_gemm",
        saved=(
            Saved(name="feed_forward_input", dims="n h"),
            Saved(name="expert_pre_activation", dims="n k 2f"),
            Saved(name="topk_weights", dims="n k", itemsize=4),
            Saved(name="row_pair", dims="n k", itemsize=4),
            Saved(name="pair_row", dims="n k", itemsize=4),
            Saved(name="expert_ends", dims="e", itemsize=4),
        ),
    )
)
register(
    Operator(
        name="expert_gather_combine",
        group="experts",
        annotation="n h, n k h -> n k h, n h",
        kind="elementwise",
        backward_bytes_ratio=1.5,  # rows and gradients are gathered, gradients combined
    )
)
register(
    Operator(
        name="shared_gate_up",
        group="shared experts",
        overlaps="ep",
        annotation="n h, 2s h -> n 2s",
        kind="dense_gemm",
        saved=(Saved(name="feed_forward_input", dims="n h"),),
    )
)
register(
    Operator(
        name="shared_swiglu",
        group="shared experts",
        overlaps="ep",
        annotation="n 2s -> n s",
        kind="elementwise",
        saved=(Saved(name="shared_gate_up", dims="n 2s"),),
    )
)
register(
    Operator(
        name="shared_down",
        group="shared experts",
        overlaps="ep",
        annotation="n s, h s -> n h",
        kind="dense_gemm",
        saved=(Saved(name="shared_activation", dims="n s"),),
    )
)
register(
    Operator(
        name="residual",
        group="norms and residuals",
        tp="replicate",
        annotation="n h, n h -> n h",
        kind="elementwise",
        backward_bytes_ratio=1.0,
    )
)
register(
    Operator(
        name="embedding",
        group="loss and embedding",
        is_lookup=True,
        annotation="n h, w h -> n h",
        kind="elementwise",
        flops=lambda dims: 0.0,
    )
)
register(
    Operator(
        name="final_norm",
        group="loss and embedding",
        tp="replicate",
        annotation="n h, h -> n h",
        kind="elementwise",
        saved=(Saved(name="x_final", dims="n h"), Saved(name="final_rstd", dims="n", itemsize=4)),
    )
)
register(
    Operator(
        name="linear_cross_entropy",
        group="loss and embedding",
        annotation="n h, w h -> n",
        kind="dense_gemm",
        flops=lambda dims: 2.0 * dims["n"] * dims["h"] * dims["w"],
        saved=(Saved(name="loss_gradient", dims="n h"), Saved(name="output_weight_gradient", dims="w h")),
    )
)
