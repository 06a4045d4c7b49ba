"""The one table of tensor names and layouts between a Hugging Face folder and a moescale model, for both directions.

A parameter of the model is made of one or more tensors of the folder, each filling a rectangular part of it: a linear
layer is one tensor, ``gate_up`` is two stacked along dim 0, and stacked experts are one (or two) tensors per expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moescale.boxes import Box, whole_box
from moescale.config import ModelConfig
from moescale.models.family import HfNames
from moescale.models.registry import family_of
from moescale.models.transformer import build_on_meta, named_weights


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A tensor of the folder and the part of a parameter it fills."""

    key: str
    """Name in the Hugging Face folder."""
    shape: tuple[int, ...]
    """Shape there."""
    index: Box
    """The part of the parameter it fills, one slice per dim of the parameter, with explicit bounds."""
    dtype: torch.dtype | None = None
    """Of the tensor in a folder, where it is not that of the other weights."""


KeyTable = dict[str, tuple[Piece, ...]]
"""Parameter name -> its pieces, in the order of a published folder."""


def build_key_table(config: ModelConfig) -> KeyTable:
    """The table of ``config``'s model: every parameter and buffer once, every tensor of the folder once."""
    names = family_of(config).names
    model = build_on_meta(config, torch.bfloat16)
    table = {name: _pieces(names, name, tuple(weight.shape)) for name, weight in named_weights(model).items()}
    for name, buffer in model.named_buffers():
        table[name] = tuple(replace(piece, dtype=buffer.dtype) for piece in table[name])
    return table


def fused_experts(names: HfNames, name: str, pieces: tuple[Piece, ...]) -> Piece | None:
    """The one tensor that holds all experts of a parameter in the fused layout of transformers 5, None for others."""
    if not name.endswith((".feed_forward.experts.gate_up", ".feed_forward.experts.down")):
        return None
    module = pieces[0].key.partition(f"{names.experts}.")[0] + names.experts
    shape = tuple(max(piece.index[dim].stop for piece in pieces) for dim in range(len(pieces[0].index)))
    return _whole(f"{module}.{'gate_up_proj' if name.endswith('gate_up') else 'down_proj'}", shape)


def _pieces(names: HfNames, name: str, shape: tuple[int, ...]) -> tuple[Piece, ...]:
    if name in names.outside_layers:
        return (_whole(names.outside_layers[name], shape),)
    _, layer, rest = name.split(".", 2)  # layers.<i>.<module>...
    prefix = names.layer_prefix.format(layer=layer)
    if rest == "feed_forward.experts.gate_up":
        return _expert_gate_up(prefix + names.experts, shape)
    if rest == "feed_forward.experts.down":
        return tuple(
            Piece(
                key=f"{prefix}{names.experts}.{expert}.down_proj.weight",
                shape=shape[1:],
                index=(slice(expert, expert + 1), slice(0, shape[1]), slice(0, shape[2])),
            )
            for expert in range(shape[0])
        )
    if rest in names.tensors:
        return (_whole(prefix + names.tensors[rest], shape),)
    module, kind = rest.rsplit(".", 1)  # kind: weight or bias
    if module in names.gate_and_up:
        rows, columns = shape[0] // 2, shape[1]
        return tuple(
            Piece(
                key=f"{prefix}{names.gate_and_up[module]}.{part}_proj.{kind}",
                shape=(rows, columns),
                index=(slice(number * rows, (number + 1) * rows), slice(0, columns)),
            )
            for number, part in enumerate(("gate", "up"))
        )
    return (_whole(f"{prefix}{names.whole[module]}.{kind}", shape),)


def _expert_gate_up(experts: str, shape: tuple[int, ...]) -> tuple[Piece, ...]:
    rows = shape[1] // 2
    return tuple(
        Piece(
            key=f"{experts}.{expert}.{part}_proj.weight",
            shape=(rows, shape[2]),
            index=(slice(expert, expert + 1), slice(number * rows, (number + 1) * rows), slice(0, shape[2])),
        )
        for expert in range(shape[0])
        for number, part in enumerate(("gate", "up"))
    )


def _whole(key: str, shape: tuple[int, ...]) -> Piece:
    return Piece(key=key, shape=shape, index=whole_box(shape))
