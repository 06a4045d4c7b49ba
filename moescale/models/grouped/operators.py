"""Operators of grouped-query attention, for the families that have it. Imports no torch.

Dims beyond those of :mod:`moescale.models.layer_operators`: g key and value heads.
"""

from __future__ import annotations

from moescale.models.grouped.config import GroupedQueryConfig
from moescale.models.layer_operators import causal_attention_flops, decoder_dims
from moescale.operators import Adaptable, Operator, Saved, register


def grouped_dims(config: GroupedQueryConfig) -> dict[str, int]:
    """Return the sizes of the dims that do not depend on the batch."""
    return decoder_dims(config) | {"g": config.num_key_value_heads, "q": config.head_dim, "v": config.head_dim}


register(
    Operator(
        name="gqa_key_value",
        group="attention projections",
        annotation="n h, 2g q h -> n 2g q",
        kind="dense_gemm",
        norm="attention_norm",
        saved=(Saved(name="attention_input", dims="n h", for_weight=True),),
        adaptable=(
            Adaptable(module="attention.k_proj", inputs="h", outputs="g q"),
            Adaptable(module="attention.v_proj", inputs="h", outputs="g q"),
        ),
    )
)
register(
    Operator(
        name="gqa_q_norm_rope",
        group="attention projections",
        tp="replicate",
        annotation="n a q, q -> n a q",
        kind="elementwise",
        backward_bytes_ratio=1.5,  # reads what was projected and the gradient, writes a gradient
        saved=(Saved(name="q_projected", dims="n a q"),),
    )
)
register(
    Operator(
        name="gqa_k_norm_rope",
        group="attention projections",
        tp="replicate",
        annotation="n g q, q -> n g q",
        kind="elementwise",
        backward_bytes_ratio=1.5,
        saved=(Saved(name="k_projected", dims="n g q"),),
    )
)
register(Operator(name="gqa_rope", group="attention", annotation="n a q, n g q -> n a q, n g q", kind="elementwise"))
register(
    Operator(
        name="gqa_attention",
        group="attention",
        annotation="n a q, n g q, n g v -> n a v",
        kind="attention",
        flops=causal_attention_flops,
        saved=(
            Saved(name="q", dims="n a q"),
            Saved(name="k", dims="n g q"),
            Saved(name="v", dims="n g v"),
            Saved(name="mixed", dims="n a v"),
            Saved(name="log_sum_exp", dims="n a", itemsize=4),
        ),
    )
)
