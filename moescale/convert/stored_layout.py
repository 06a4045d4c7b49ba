"""Matches what a Hugging Face folder stores with the parameters of a model, from the shards' headers alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moescale.boxes import Box, overlap, relative_to, whole_box
from moescale.config import ModelConfig
from moescale.convert.hf_config import read_hf_config
from moescale.convert.key_table import KeyTable, Piece, build_key_table, fused_experts, mxfp4_experts
from moescale.convert.mxfp4 import dequantize
from moescale.convert.weight_files import (
    StoredTensor,
    has_weights,
    read_headers,
    read_parts,
)
from moescale.errors import CheckpointError, NonFiniteWeightsError
from moescale.models.family import HfNames
from moescale.models.registry import family_of, find_family

_RECOMPUTED = re.compile(r"rotary_emb\.inv_freq$")
"""Buffers in some published folders, which the model computes itself."""
DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def folder_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of a folder's weights: from config.json, else that of most values, else bf16.

    Raises CheckpointError if config.json names no dtype and the weights are damaged.
    """
    document = read_hf_config(folder)
    name = str(document.get("dtype") or document.get("torch_dtype")).removeprefix("torch.")
    named = next((dtype for dtype, known in DTYPE_NAMES.items() if known == name), None)
    if named is not None:
        return named
    if not has_weights(folder):
        return torch.bfloat16
    values: Counter[torch.dtype] = Counter()
    for tensor in read_headers(folder, may_be_absent=_tied_keys(find_family(document["model_type"]).names)).values():
        if tensor.dtype.is_floating_point:
            values[tensor.dtype] += math.prod(tensor.shape)
    return values.most_common(1)[0][0] if values else torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A copy to be made: from a part of a stored tensor to a part of a parameter."""

    key: str
    source: Box
    """The part of the stored tensor to read."""
    target: torch.Tensor
    """View of the parameter to write to."""
    rearranged: Piece | None = None
    """The piece whose order must be converted, after which the box ``wanted`` of the expert is taken."""
    wanted: Box = ()


def copies_of(piece: Piece, part: Box, parameter: torch.Tensor) -> Iterable[Copy]:
    """Yield the copies of ``piece`` into ``part`` of its parameter; reordered experts one by one, to save memory."""
    common = overlap(piece.index, part)
    if common is None:
        return
    if piece.is_rearranged:
        rest = tuple(slice(0, size) for size in piece.shape[1:])
        for expert in range(common[0].start, common[0].stop):
            number = slice(expert, expert + 1)
            yield Copy(
                key=piece.key,
                source=(number, *rest),
                target=parameter.detach()[relative_to((number, *common[1:]), part)],
                rearranged=piece,
                wanted=(slice(0, 1), *common[1:]),
            )
        return
    inside = relative_to(common, piece.index)
    # A stored expert has no expert dim; its index in that dim is always 0:1.
    yield Copy(
        key=piece.key,
        source=inside[len(inside) - len(piece.shape) :],
        target=parameter.detach()[relative_to(common, part)],
    )


def read_layout(folder: Path, config: ModelConfig) -> tuple[KeyTable, dict[str, StoredTensor]]:
    """Return the table of ``config`` with the keys of ``folder``, and its stored tensors.

    Raises CheckpointError naming a tensor that is missing, extra, or of the wrong shape or dtype.
    """
    stored = read_headers(folder, may_be_absent=_tied_keys(family_of(config).names) if config.tie_embeddings else ())
    table = _as_stored(build_key_table(config), config, stored)
    _check_stored(folder, config, table, stored)
    return table, stored


def _values_of(copy: Copy, tensor: torch.Tensor, stored: Mapping[str, StoredTensor]) -> torch.Tensor:
    """Return the values that were read, unpacked and in the parameter's order."""
    piece = copy.rearranged
    if piece is None:
        return tensor
    if piece.scales is not None:
        (scales,) = read_parts(stored[piece.scales].file, [(piece.scales, copy.source[:-1])])
        tensor = dequantize(tensor, scales)
    return piece.to_parameter(tensor)[copy.wanted]


def fill(copy: Copy, tensor: torch.Tensor, stored: Mapping[str, StoredTensor]) -> None:
    """Write the ``tensor`` read for ``copy`` to its target. Raises NonFiniteWeightsError naming the tensor."""
    copy.target.copy_(_values_of(copy, tensor, stored).view(copy.target.shape))
    if not torch.isfinite(copy.target).all():
        raise NonFiniteWeightsError(
            f"{stored[copy.key].file}: tensor '{copy.key}' has values that are not finite, or not in "
            f"{copy.target.dtype}; fetch the folder again, or ask who made it"
        )


def _tied_keys(names: HfNames) -> tuple[str, str]:
    return names.embedding, names.output


def _as_stored(table: KeyTable, config: ModelConfig, stored: Mapping[str, StoredTensor]) -> KeyTable:
    """Return the table with the keys of this folder, which may have another known layout of the same weights.

    A tied embedding may be stored under the name of the output; transformers 5 can also fuse the experts of a layer.
    """
    found, names = dict(table), family_of(config).names
    for name, pieces in table.items():
        fused = fused_experts(names, name, pieces)
        if fused is not None and fused.key in stored:
            found[name] = (fused,)
        if names.experts_are_stacked and pieces[0].is_transposed and f"{pieces[0].key}_blocks" in stored:
            found[name] = (mxfp4_experts(pieces[0]),)
        is_embedding = config.tie_embeddings and pieces[0].key == names.embedding
        if is_embedding and names.embedding not in stored and names.output in stored:
            found[name] = (replace(pieces[0], key=names.output),)
    return found


def _check_stored(folder: Path, config: ModelConfig, table: KeyTable, stored: Mapping[str, StoredTensor]) -> None:
    expected = {piece.key: piece for pieces in table.values() for piece in pieces}
    for piece in list(expected.values()):
        if piece.scales is not None:
            expected[piece.scales] = replace(piece, key=piece.scales, shape=piece.shape[:-1])
    missing = [key for key in expected if key not in stored]
    if missing:
        raise CheckpointError(f"{folder}: lacks tensor '{missing[0]}' ({len(missing)} missing in all)")
    for key, piece in expected.items():
        if (stored[key].dtype == torch.uint8) != (piece.dtype == torch.uint8):
            raise CheckpointError(
                f"{stored[key].file}: tensor '{key}' has dtype {stored[key].dtype}, which it has in no layout that is "
                "known; convert the folder to bf16"
            )
        if stored[key].shape != piece.shape:
            raise CheckpointError(
                f"{stored[key].file}: tensor '{key}' has shape {stored[key].shape}, config.json asks for {piece.shape}"
            )
    names = family_of(config).names
    kept = _of_prediction_layers(config)
    extra = [key for key in stored if key not in expected and not key.startswith(kept) and not _RECOMPUTED.search(key)]
    if config.tie_embeddings and extra == [names.output]:
        return _check_tied(names, stored)
    if extra:
        raise CheckpointError(
            f"{stored[extra[0]].file}: tensor '{extra[0]}' has no place in the model that config.json describes "
            f"({len(extra)} such in all)"
        )


def _check_tied(names: HfNames, stored: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError if a tied model stores two different embeddings."""
    output, embedding = stored[names.output], stored[names.embedding]
    whole = whole_box(embedding.shape)
    if output.shape == embedding.shape:
        (first,) = read_parts(output.file, [(names.output, whole)])
        (second,) = read_parts(embedding.file, [(names.embedding, whole)])
        if torch.equal(first, second):
            return
    raise CheckpointError(
        f"{output.file}: tensor '{names.output}' differs from '{names.embedding}', but config.json says "
        "tie_word_embeddings; set it to false, or remove the tensor"
    )


def kept_tensors(folder: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """Return the tensors for multi-token prediction in a folder. They are not trained, and an export copies them.

    Empty if the folder has no weights. Raises CheckpointError if they are damaged.
    """
    if not config.num_prediction_layers or not has_weights(folder):
        return {}
    kept = _of_prediction_layers(config)
    stored = read_headers(folder, may_be_absent=_tied_keys(family_of(config).names))
    return {key: tensor for key, tensor in stored.items() if key.startswith(kept)}


def _of_prediction_layers(config: ModelConfig) -> tuple[str, ...]:
    """Return the prefixes of the tensors of the layers for multi-token prediction, which follow the last layer."""
    prefix = family_of(config).names.layer_prefix
    behind = range(config.num_layers, config.num_layers + config.num_prediction_layers)
    return tuple(prefix.format(layer=layer) for layer in behind)
