"""The operators of attention with sinks and windows, and the layers of a gpt-oss model. Imports no torch.

Dims beyond those of :mod:`moescale.models.grouped.operators`: o window, p layers with a window, m layers.
"""

from __future__ import annotations

from dataclasses import replace

from moescale.models.family import LayerList
from moescale.models.gpt_oss.config import GptOssConfig
from moescale.models.grouped.operators import grouped_dims
from moescale.models.layer_operators import causal_attention_flops, decoder_layers
from moescale.operators import Dims, Operator, operator, register

_ATTENTION = ("q_proj", "gqa_key_value", "gqa_rope", "sink_attention")


def layers(config: GptOssConfig) -> tuple[LayerList, ...]:
    """Return the operators of a dense layer, of which there is none, and of an MoE layer."""
    return tuple(
        replace(layers, operators=tuple(part for name in layers.operators for part in _with_biases(name)))
        for layers in decoder_layers(config, _ATTENTION)
    )


def _with_biases(name: str) -> tuple[str, ...]:
    return (name, "expert_biases") if name == "experts" else (name,)


def dims(config: GptOssConfig) -> dict[str, int]:
    """Return the sizes of the dims that do not depend on the batch."""
    return grouped_dims(config) | {
        "o": config.window,
        "p": len(config.windowed_layers),
        "m": config.num_layers,
    }


def biases(config: GptOssConfig) -> int:
    """Return a layer's biases and sinks, without the biases of experts, which are an operator's."""
    key_values = 2 * config.num_key_value_heads * config.head_dim
    attention = config.num_heads * config.head_dim + key_values + config.hidden_size
    return (attention if config.attention_bias else 0) + config.num_heads + (config.num_experts or 0)


def _attention_flops(dims: Dims) -> float:
    """Return the mean over layers with and without a window: plans know one kind of MoE layer."""
    causal = causal_attention_flops(dims)
    window = min(dims["o"], dims["x"])
    # Of the causal half of the square, x * x / 2, a window leaves o * x - o * o / 2.
    windowed = causal * (2 * window * dims["x"] - window * window) / dims["x"] ** 2
    return (dims["p"] * windowed + (dims["m"] - dims["p"]) * causal) / dims["m"]


register(
    Operator(
        name="sink_attention",
        group="attention",
        annotation="n a q, n g q, n g v -> n a v",
        kind="attention",
        flops=_attention_flops,
        saved=operator("gqa_attention").saved,
    )
)
register(
    Operator(
        name="expert_biases",
        group="experts",
        # Added in the GEMMs; the backward sums the gradients of all rows.
        annotation="n k 2f, e 2f, e h -> n k h",
        kind="elementwise",
        backward_bytes_ratio=1.0,
    )
)
