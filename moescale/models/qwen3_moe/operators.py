"""The operators of a Qwen3-MoE model, by kind of layer. Imports no torch.

Outside attention they are those of :mod:`moescale.models.deepseek_v2.operators`, whose dims have the same names; g are
the key and value heads.
"""

from __future__ import annotations

from moescale.models import deepseek_v2  # noqa: F401 - registers the operators outside attention
from moescale.models.family import LayerList
from moescale.models.qwen3_moe.config import Qwen3MoeConfig
from moescale.operators import Dims, Operator, Saved, register

_ATTENTION = (
    *("attention_norm", "q_proj", "gqa_key_value", "gqa_q_norm", "gqa_k_norm", "gqa_rope", "gqa_attention"),
    *("attention_output", "feed_forward_norm"),
)


def layers(config: Qwen3MoeConfig) -> tuple[LayerList, ...]:
    """Return the operators of a dense and of an MoE layer."""
    dense = (*_ATTENTION, "dense_gate_up", "dense_swiglu", "dense_down", "residual")
    moe = (*_ATTENTION, "router", "experts", "expert_gather_combine", "residual")
    return (
        LayerList(name="dense", operators=dense, count=config.num_layers - config.num_moe_layers),
        LayerList(name="moe", operators=moe, count=config.num_moe_layers),
    )


def outside(config: Qwen3MoeConfig) -> tuple[str, ...]:
    """Return the operators that are in no layer."""
    return ("embedding", "final_norm", "linear_cross_entropy")


def dims(config: Qwen3MoeConfig) -> dict[str, int]:
    """Sizes of the dims that do not depend on the batch."""
    return {
        "h": config.hidden_size,
        "a": config.num_heads,
        "g": config.num_key_value_heads,
        "q": config.head_dim,
        "v": config.head_dim,
        "e": config.num_experts or 0,
        "k": config.top_k,
        "f": config.expert_intermediate_size,
        "i": config.dense_intermediate_size,
        "w": config.vocab_size,
    }


def biases(config: Qwen3MoeConfig) -> int:
    """Return 0: the family has none."""
    return 0


def _attention_flops(dims: Dims) -> float:
    """Return the FLOPs of two GEMMs over the causal half of the square."""
    return dims["n"] * dims["a"] * dims["x"] * (dims["q"] + dims["v"])


register(
    Operator(
        name="gqa_key_value",
        group="attention projections",
        annotation="n h, 2g q h -> n 2g q",
        kind="dense_gemm",
        saved=(Saved(name="attention_input", dims="n h"),),
    )
)
register(
    Operator(
        name="gqa_q_norm",
        group="attention projections",
        tp="replicate",
        annotation="n a q, q -> n a q",
        kind="elementwise",
        saved=(Saved(name="q_projected", dims="n a q"), Saved(name="gqa_q_rstd", dims="n a", itemsize=4)),
    )
)
register(
    Operator(
        name="gqa_k_norm",
        group="attention projections",
        tp="replicate",
        annotation="n g q, q -> n g q",
        kind="elementwise",
        saved=(Saved(name="k_projected", dims="n g q"), Saved(name="gqa_k_rstd", dims="n g", itemsize=4)),
    )
)
register(Operator(name="gqa_rope", group="attention", annotation="n a q, n g q -> n a q, n g q", kind="elementwise"))
register(
    Operator(
        name="gqa_attention",
        group="attention",
        annotation="n a q, n g q, n g v -> n a v",
        kind="attention",
        flops=_attention_flops,
        saved=(
            Saved(name="q", dims="n a q"),
            Saved(name="k", dims="n g q"),
            Saved(name="v", dims="n g v"),
            Saved(name="mixed", dims="n a v"),
            Saved(name="log_sum_exp", dims="n a", itemsize=4),
        ),
    )
)
