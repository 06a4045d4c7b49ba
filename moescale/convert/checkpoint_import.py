"""Imports a Hugging Face checkpoint folder into a model, shard by shard.

All names, shapes and dtypes are checked from the shards' headers first. Then each tensor is copied into its part of a
parameter, with one shard mapped at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from moescale.boxes import Box, box_shape, whole_box
from moescale.config import ModelConfig
from moescale.convert.key_table import KeyTable
from moescale.convert.stored_layout import Copy, copies_of, fill, read_layout
from moescale.convert.weight_files import Progress, read_parts
from moescale.errors import CheckpointError


@torch.no_grad()
def import_checkpoint(
    folder: Path,
    config: ModelConfig,
    parameters: Mapping[str, torch.Tensor],
    *,
    parts: Mapping[str, Box] | None = None,
    leave_out: Collection[str] = (),
    on_progress: Progress | None = None,
) -> None:
    """Copy the weights of a Hugging Face folder into ``parameters``, converted to their dtype, on their device.

    Weights for multi-token prediction are ignored (``kept_tensors`` returns them).

    Args:
        parameters: all parameters and buffers of the model by name. With ``parts``, each tensor is only that part of
            its parameter, and only the part is read.
        parts: for each parameter, one slice with explicit bounds per dim.
        leave_out: names of parameters of which only the headers are checked.

    Raises CheckpointError, before any parameter is modified, naming a tensor that is missing, extra, of the wrong shape
    or dtype, or in a truncated file. Raises NonFiniteWeightsError naming a tensor with NaN or infinity.
    """
    table, stored = read_layout(folder, config)
    table = {name: pieces for name, pieces in table.items() if name not in leave_out}
    _check_parameters(table, parameters, parts)
    wanted: dict[Path, list[Copy]] = {}
    for name, pieces in table.items():
        part = parts[name] if parts is not None else whole_box(parameters[name].shape)
        for piece in pieces:
            for copy in copies_of(piece, part, parameters[name]):
                wanted.setdefault(stored[piece.key].file, []).append(copy)
    total = sum(copy.target.nbytes for copies in wanted.values() for copy in copies)
    done = 0
    for file in sorted(wanted):
        copies = wanted[file]
        tensors = read_parts(file, ((copy.key, copy.source) for copy in copies))
        for copy, tensor in zip(copies, tensors, strict=True):
            fill(copy, tensor, stored)
            done += copy.target.nbytes
            if on_progress is not None:
                on_progress(done, total)


def _check_parameters(table: KeyTable, parameters: Mapping[str, torch.Tensor], parts: Mapping[str, Box] | None) -> None:
    """Check the model against the table. Both come from one configuration, so a difference is the caller's error."""
    for name, pieces in table.items():
        shape = tuple(max(piece.index[dim].stop for piece in pieces) for dim in range(len(pieces[0].index)))
        if parts is not None:
            shape = box_shape(parts[name])
        if name not in parameters or tuple(parameters[name].shape) != shape:
            found = tuple(parameters[name].shape) if name in parameters else "none"
            raise CheckpointError(f"parameter '{name}' of the model must have shape {shape}, it has {found}")
