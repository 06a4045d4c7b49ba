"""The table of tensor names and layouts between a Hugging Face folder and a moescale model, for both directions.

A parameter of the model consists of one or more tensors of the folder, each of which fills a box of it: a linear layer
is one tensor, ``gate_up`` is two stacked along dim 0, and stacked experts are one (or two) tensors per expert. In a
folder that stacks experts itself, their matrices may be transposed, with gate and up interleaved.
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
    """A tensor of the folder, and the box of a parameter that it fills."""

    key: str
    """Name in the Hugging Face folder."""
    shape: tuple[int, ...]
    """Shape in the folder."""
    index: Box
    """The box of the parameter: one slice with explicit bounds per dim of the parameter."""
    dtype: torch.dtype | None = None
    """Dtype in the folder, if it differs from that of the other weights."""
    is_transposed: bool = False
    """The last two dims are swapped in the folder."""
    alternates: bool = False
    """Gate and up are interleaved in the folder along dim 1 of the parameter, whose first half is the gate."""
    scales: str | None = None
    """Name of the tensor of scales, if ``key`` holds MXFP4 blocks."""

    @property
    def is_rearranged(self) -> bool:
        """True if the values are packed, or ordered differently than in the parameter."""
        return self.is_transposed or self.alternates or self.scales is not None

    def to_parameter(self, stored: torch.Tensor) -> torch.Tensor:
        """Convert experts [experts, ...] from the folder's order to the parameter's."""
        values = stored.transpose(-1, -2) if self.is_transposed else stored
        return values.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2) if self.alternates else values

    def to_stored(self, parameter: torch.Tensor) -> torch.Tensor:
        """Convert experts from the parameter's order to the folder's: the inverse of :meth:`to_parameter`."""
        values = parameter.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2) if self.alternates else parameter
        return values.transpose(-1, -2) if self.is_transposed else values


KeyTable = dict[str, tuple[Piece, ...]]
"""Parameter name -> its pieces, in the order of a published folder."""


def build_key_table(config: ModelConfig) -> KeyTable:
    """Return the table of the model of ``config``: every parameter and buffer once, every tensor of the folder once."""
    names = family_of(config).names
    model = build_on_meta(config, torch.bfloat16)
    table = {name: _pieces(names, name, tuple(weight.shape)) for name, weight in named_weights(model).items()}
    for name, buffer in model.named_buffers():
        table[name] = tuple(replace(piece, dtype=buffer.dtype) for piece in table[name])
    return table


def fused_experts(names: HfNames, name: str, pieces: tuple[Piece, ...]) -> Piece | None:
    """Return the tensor with all experts of a parameter in the fused layout of transformers 5, or None."""
    if names.experts_are_stacked or not name.endswith((".feed_forward.experts.gate_up", ".feed_forward.experts.down")):
        return None
    module = pieces[0].key.partition(f"{names.experts}.")[0] + names.experts
    shape = tuple(max(piece.index[dim].stop for piece in pieces) for dim in range(len(pieces[0].index)))
    return _whole(f"{module}.{'gate_up_proj' if name.endswith('gate_up') else 'down_proj'}", shape)


def mxfp4_experts(piece: Piece) -> Piece:
    """Return the piece of stacked experts in MXFP4: blocks of 32 values along the weight's columns, two per byte."""
    num_experts, rows, columns = (bounds.stop for bounds in piece.index)
    return replace(
        piece,
        key=f"{piece.key}_blocks",
        scales=f"{piece.key}_scales",
        shape=(num_experts, rows, columns // 32, 16),
        dtype=torch.uint8,
        is_transposed=False,
    )


def _pieces(names: HfNames, name: str, shape: tuple[int, ...]) -> tuple[Piece, ...]:
    if name in names.outside_layers:
        return (_whole(names.outside_layers[name], shape),)
    _, layer, rest = name.split(".", 2)  # layers.<i>.<module>...
    prefix = names.layer_prefix.format(layer=layer)
    if names.experts_are_stacked and rest.startswith("feed_forward.experts."):
        part = rest.removeprefix("feed_forward.experts.")
        weight, is_bias = part.removesuffix("_bias"), part.endswith("_bias")
        return (
            Piece(
                key=f"{prefix}{names.experts}.{weight}_proj{'_bias' if is_bias else ''}",
                shape=shape if is_bias else (shape[0], shape[2], shape[1]),
                index=whole_box(shape),
                is_transposed=not is_bias,
                alternates=weight == "gate_up",
            ),
        )
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
