"""Operators that decoders of every family share, and the lists of layers made of them. Imports no torch.

A family names the operators of its attention; what stands around it, in front of the feed-forward and outside the
layers is here. Tests hold parameters, FLOPs and saved bytes to the real models.

Dims: n tokens, h hidden, a heads, q query-key width of a head, v value width of a head, e experts, k experts per token,
f expert intermediate size, s shared experts' intermediate size, i dense intermediate size, w vocabulary, x sequence
length, b sequences.
"""

from __future__ import annotations

from moescale.config import ModelConfig
from moescale.models.family import LayerList
from moescale.operators import Adaptable, Dims, Operator, Recompute, Saved, register

OUTSIDE = ("embedding", "final_norm", "linear_cross_entropy")
"""The operators that are in no layer."""
FUSED_SHARES = (5 / 6, 14 / 12)
"""Of the bytes of SwiGLU, where it quantises: the result is written in e4m3 alone; the backward writes it in bf16, and
the gradient in both."""


def decoder_layers(config: ModelConfig, attention: tuple[str, ...]) -> tuple[LayerList, ...]:
    """Return the operators of a dense and of an MoE layer around those of ``attention``, norm and output left out."""
    mixing = ("attention_norm", *attention, "attention_output", "feed_forward_norm")
    shared = ("shared_gate_up", "shared_swiglu", "shared_down") if config.num_shared_experts else ()
    dense = (*mixing, "dense_gate_up", "dense_swiglu", "dense_down", "residual")
    moe = (*mixing, "router", "experts", "expert_gather_combine", *shared, "residual")
    of_moe = tuple(layer for layer in range(config.num_layers) if config.is_moe_layer(layer))
    others = tuple(layer for layer in range(config.num_layers) if layer not in of_moe)
    return (
        LayerList(name="dense", operators=dense, indices=others),
        LayerList(name="moe", operators=moe, indices=of_moe),
    )


def decoder_dims(config: ModelConfig) -> dict[str, int]:
    """Return the sizes of the dims above that do not depend on the batch; head widths are the family's."""
    return {
        "h": config.hidden_size,
        "a": config.num_heads,
        "e": config.num_experts or 0,
        "k": config.top_k,
        "f": config.expert_intermediate_size,
        "s": config.num_shared_experts * config.expert_intermediate_size,
        "i": config.dense_intermediate_size,
        "w": config.vocab_size,
    }


def causal_attention_flops(dims: Dims) -> float:
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
        norm="attention_norm",
        saved=(Saved(name="attention_input", dims="n h", for_weight=True),),
        adaptable=(Adaptable(module="attention.q_proj", inputs="h", outputs="a q"),),
    )
)
register(
    Operator(
        name="attention_output",
        group="attention projections",
        annotation="n a v, h a v -> n h",
        kind="dense_gemm",
        saved=(Saved(name="mixed", dims="n a v", for_weight=True),),
        adaptable=(Adaptable(module="attention.output", inputs="a v", outputs="h"),),
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
        norm="feed_forward_norm",
        saved=(Saved(name="feed_forward_input", dims="n h", for_weight=True),),
        adaptable=(Adaptable(module="feed_forward.gate_up", inputs="h", outputs="2i", parts=2),),
    )
)
register(
    Operator(
        name="dense_swiglu",
        group="dense layers",
        annotation="n 2i -> n i",
        kind="elementwise",
        fp8_bytes_shares=FUSED_SHARES,
        between=("dense_gate_up", "dense_down"),
        saved=(Saved(name="dense_gate_up", dims="n 2i"),),
    )
)
register(
    Operator(
        name="dense_down",
        group="dense layers",
        annotation="n i, h i -> n h",
        kind="dense_gemm",
        saved=(Saved(name="dense_activation", dims="n i", for_weight=True),),
        adaptable=(Adaptable(module="feed_forward.down", inputs="i", outputs="h"),),
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
        norm="feed_forward_norm",
        saved=(
            Saved(name="feed_forward_input", dims="n h"),
            Saved(name="expert_pre_activation", dims="n k 2f"),
            Saved(name="topk_weights", dims="n k", itemsize=4),
            Saved(name="row_pair", dims="n k", itemsize=4),
            Saved(name="pair_row", dims="n k", itemsize=4),
            Saved(name="expert_ends", dims="e", itemsize=4),
        ),
        adaptable=(
            Adaptable(module="feed_forward.experts", inputs="h", outputs="2f"),
            Adaptable(module="feed_forward.experts", inputs="f", outputs="h"),
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
        # Gathered rows are written in e4m3. The backward gathers the gradients' alone, and transposes those of tokens.
        fp8_bytes_shares=(3 / 4, 1 / 2),
    )
)
register(
    Operator(
        name="shared_gate_up",
        group="shared experts",
        overlaps="ep",
        annotation="n h, 2s h -> n 2s",
        kind="dense_gemm",
        norm="feed_forward_norm",
        saved=(Saved(name="feed_forward_input", dims="n h", for_weight=True),),
        adaptable=(Adaptable(module="feed_forward.shared_experts.gate_up", inputs="h", outputs="2s", parts=2),),
    )
)
register(
    Operator(
        name="shared_swiglu",
        group="shared experts",
        overlaps="ep",
        annotation="n 2s -> n s",
        kind="elementwise",
        fp8_bytes_shares=FUSED_SHARES,
        between=("shared_gate_up", "shared_down"),
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
        saved=(Saved(name="shared_activation", dims="n s", for_weight=True),),
        adaptable=(Adaptable(module="feed_forward.shared_experts.down", inputs="s", outputs="h"),),
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
        saved=(
            Saved(name="loss_gradient", dims="n h"),
            Saved(name="output_weight_gradient", dims="w h", for_weight=True),
        ),
    )
)
