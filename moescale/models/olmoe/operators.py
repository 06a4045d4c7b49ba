"""The layers of an OLMoE model, and its norms over all heads at once. Imports no torch.

Dims: those of :mod:`moescale.models.grouped.operators`.
"""

from __future__ import annotations

from moescale.models.family import LayerList
from moescale.models.layer_operators import decoder_layers
from moescale.models.olmoe.config import OlmoeConfig
from moescale.operators import Operator, Saved, register

_ATTENTION = ("q_proj", "gqa_key_value", "whole_q_norm", "whole_k_norm", "gqa_rope", "gqa_attention")


def layers(config: OlmoeConfig) -> tuple[LayerList, ...]:
    """Return the operators of a dense layer, of which there is none, and of an MoE layer."""
    return decoder_layers(config, _ATTENTION)


register(
    Operator(
        name="whole_q_norm",
        group="attention projections",
        tp="replicate",
        annotation="n a q, a q -> n a q",
        kind="elementwise",
        saved=(Saved(name="q_projected", dims="n a q"), Saved(name="whole_q_rstd", dims="n", itemsize=4)),
    )
)
register(
    Operator(
        name="whole_k_norm",
        group="attention projections",
        tp="replicate",
        annotation="n g q, g q -> n g q",
        kind="elementwise",
        saved=(Saved(name="k_projected", dims="n g q"), Saved(name="whole_k_rstd", dims="n", itemsize=4)),
    )
)
