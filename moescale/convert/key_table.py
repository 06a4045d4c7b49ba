"""The one table of tensor names and layouts between a Hugging Face folder and a moescale model, for both directions.

A parameter of the model is made of one or more tensors of the folder, each filling a rectangular part of it: a linear
layer is one tensor, ``gate_up`` is two stacked along dim 0, and stacked experts are one (or two) tensors per expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moescale.boxes import Box, whole_box
from moescale.config import ModelConfig
from moescale.model.transformer import build_on_meta


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A tensor of the folder and the part of a parameter it fills."""

    key: str
    """Name in the Hugging Face folder."""
    shape: tuple[int, ...]
    """Shape there."""
    index: Box
    """The part of the parameter it fills, one slice per dim of the parameter, with explicit bounds."""


KeyTable = dict[str, tuple[Piece, ...]]
"""Parameter name -> its pieces, in the order of a published folder."""

_WHOLE = {
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
}
_GATE_AND_UP = {
    "feed_forward.gate_up": "mlp",
    "feed_forward.shared_experts.gate_up": "mlp.shared_experts",
}
_OUTSIDE_LAYERS = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def build_key_table(config: ModelConfig) -> KeyTable:
    """The table of ``config``'s model: every parameter once, every tensor of the folder once."""
    model = build_on_meta(config, torch.bfloat16)
    return {name: _pieces(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()}


def _pieces(name: str, shape: tuple[int, ...]) -> tuple[Piece, ...]:
    if name in _OUTSIDE_LAYERS:
        return (_whole(_OUTSIDE_LAYERS[name], shape),)
    _, layer, rest = name.split(".", 2)  # layers.<i>.<module>...
    prefix = f"model.layers.{layer}."
    if rest == "feed_forward.experts.gate_up":
        return _expert_gate_up(prefix, shape)
    if rest == "feed_forward.experts.down":
        return tuple(
            Piece(
                key=f"{prefix}mlp.experts.{expert}.down_proj.weight",
                shape=shape[1:],
                index=(slice(expert, expert + 1), slice(0, shape[1]), slice(0, shape[2])),
            )
            for expert in range(shape[0])
        )
    module, kind = rest.rsplit(".", 1)  # kind: weight or bias
    if module in _GATE_AND_UP:
        rows, columns = shape[0] // 2, shape[1]
        return tuple(
            Piece(
                key=f"{prefix}{_GATE_AND_UP[module]}.{part}_proj.{kind}",
                shape=(rows, columns),
                index=(slice(number * rows, (number + 1) * rows), slice(0, columns)),
            )
            for number, part in enumerate(("gate", "up"))
        )
    return (_whole(f"{prefix}{_WHOLE[module]}.{kind}", shape),)


def _expert_gate_up(prefix: str, shape: tuple[int, ...]) -> tuple[Piece, ...]:
    rows = shape[1] // 2
    return tuple(
        Piece(
            key=f"{prefix}mlp.experts.{expert}.{part}_proj.weight",
            shape=(rows, shape[2]),
            index=(slice(expert, expert + 1), slice(number * rows, (number + 1) * rows), slice(0, shape[2])),
        )
        for expert in range(shape[0])
        for number, part in enumerate(("gate", "up"))
    )


def _whole(key: str, shape: tuple[int, ...]) -> Piece:
    return Piece(key=key, shape=shape, index=whole_box(shape))
