"""Exports weights as a Hugging Face checkpoint folder, shard by shard.

Everything that can be checked is checked before anything is written. Shards are planned from shapes, then filled and
written one at a time to a hidden folder, which is renamed when all are on disk.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from moescale.boxes import whole_box
from moescale.config import ModelConfig
from moescale.convert.hf_config import CONFIG_FILE, read_hf_config, read_model_config, transformers_differences
from moescale.convert.key_table import KeyTable, Piece, build_key_table
from moescale.convert.staged_export import check_output, staged_export
from moescale.convert.stored_layout import DTYPE_NAMES, kept_tensors
from moescale.convert.tensor_source import TensorSource
from moescale.convert.weight_files import (
    INDEX_FILE,
    SINGLE_FILE,
    WEIGHT_ENDINGS,
    Progress,
    StoredTensor,
    read_headers,
    read_parts,
)
from moescale.errors import CheckpointError, ConfigError
from moescale.files import write_atomically, written_by_library


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """Summary of an export."""

    output: Path
    num_tensors: int
    num_shards: int
    weight_bytes: int
    warnings: tuple[str, ...]
    """Differences between transformers' computation and that of the training, and weights that were not trained."""


@torch.no_grad()
def export_checkpoint(
    config: ModelConfig,
    source: TensorSource,
    output: Path,
    *,
    reference: Path,
    ignored_fields: Collection[str] = (),
    dtype: torch.dtype,
    max_shard_bytes: int = 5_000_000_000,
    on_progress: Progress | None = None,
) -> ExportReport:
    """Write ``source`` as a Hugging Face folder that transformers opens without remote code.

    Args:
        output: must not exist or be empty; appears complete or not at all.
        reference: folder whose config.json, tokenizer, generation and code files are copied; its config.json is
            copied byte for byte unless ``dtype`` differs from the one it names.
        dtype: dtype of the written weights, whatever that of ``source``. Buffers stay fp32, and tensors kept from
            ``reference`` (``kept_tensors``) keep their dtype.
        max_shard_bytes: upper limit of a shard, exceeded only by a single larger tensor. Host memory needed: one shard
            and one parameter (of stacked experts: one expert).

    Raises CheckpointError naming a tensor that is missing, extra, of the wrong shape, not finite, or overflows
    ``dtype``; ConfigError if ``reference`` describes another model, or contains links to files outside it.
    """
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes ({max_shard_bytes}) must be positive")
    if not reference.is_dir():
        raise CheckpointError(
            f"{reference}: is not a folder; the reference must be one, with the config.json and tokenizer to copy"
        )
    table = build_key_table(config)
    _check_source(table, source)
    if read_model_config(reference, ignored_fields) != config:
        raise ConfigError(
            f"{reference / CONFIG_FILE}: describes another model than the weights; give the right --model"
        )
    companions = _find_companions(reference)
    check_output(output)
    kept = kept_tensors(reference, config)
    for key, stored in kept.items():
        table[key] = (Piece(key=key, shape=stored.shape, index=whole_box(stored.shape), dtype=stored.dtype),)
    shards = _plan_shards(table, dtype, max_shard_bytes)
    weight_bytes = sum(_bytes_of(piece, dtype) for shard in shards for _, piece in shard)
    with staged_export(output) as folder:
        _copy_companions(companions, reference, folder, dtype)
        _write_shards(shards, _WithKept(source, kept), folder, dtype, weight_bytes, on_progress)
        _check_written(folder, shards, dtype)
    return ExportReport(
        output=output,
        num_tensors=sum(map(len, shards)),
        num_shards=len(shards),
        weight_bytes=weight_bytes,
        warnings=(
            *transformers_differences(config),
            *_untrained(config, reference, len(kept)),
            *_unpacked(reference, dtype),
        ),
    )


def _untrained(config: ModelConfig, reference: Path, num_kept: int) -> list[str]:
    """Return a warning about the weights for multi-token prediction, if the model has any."""
    if not config.num_prediction_layers:
        return []
    if num_kept:
        return [f"multi-token prediction was not trained: its {num_kept} tensors are those of {reference}, unchanged"]
    return [f"{reference} holds no tensors for multi-token prediction, so the export has none"]


def _unpacked(reference: Path, dtype: torch.dtype) -> list[str]:
    """Return a warning if the reference's weights are quantized, because the export's are not."""
    if read_hf_config(reference).get("quantization_config") is None:
        return []
    return [f"{reference} describes experts in MXFP4; this export holds them in {DTYPE_NAMES[dtype]}, not quantized"]


def _check_source(table: KeyTable, source: TensorSource) -> None:
    names = set(source.names())
    for problem, difference in (("lack", table.keys() - names), ("have an unknown", names - table.keys())):
        if difference:
            raise CheckpointError(f"the weights {problem} parameter '{min(difference)}' ({len(difference)} in all)")
    for name, pieces in table.items():
        shape = tuple(max(piece.index[dim].stop for piece in pieces) for dim in range(len(pieces[0].index)))
        if source.shape(name) != shape:
            raise CheckpointError(f"parameter '{name}' has shape {source.shape(name)}, the model wants {shape}")


class _WithKept:
    """A source of weights together with tensors of another folder, which are copied unchanged."""

    def __init__(self, source: TensorSource, kept: Mapping[str, StoredTensor]) -> None:
        self._source, self._kept = source, kept

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        if name not in self._kept:
            return self._source.read(name, index)
        stored = self._kept[name]
        (tensor,) = read_parts(stored.file, [(name, whole_box(stored.shape))])
        return tensor


_Shard = list[tuple[str, Piece]]


def _plan_shards(table: KeyTable, dtype: torch.dtype, max_bytes: int) -> list[_Shard]:
    shards: list[_Shard] = [[]]
    size = 0
    for name, pieces in table.items():
        for piece in pieces:
            piece_bytes = _bytes_of(piece, dtype)
            if shards[-1] and size + piece_bytes > max_bytes:
                shards.append([])
                size = 0
            shards[-1].append((name, piece))
            size += piece_bytes
    return shards


def _bytes_of(piece: Piece, dtype: torch.dtype) -> int:
    return math.prod(piece.shape) * (piece.dtype or dtype).itemsize


def _write_shards(
    shards: list[_Shard],
    source: _WithKept,
    folder: Path,
    dtype: torch.dtype,
    weight_bytes: int,
    on_progress: Progress | None,
) -> None:
    weight_map: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, start=1):
        file_name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        read: tuple[object, torch.Tensor] = (None, torch.empty(0))
        for name, piece in shard:
            expert = piece.index[0].start if len(piece.index) > len(piece.shape) else None
            if read[0] != (name, expert):
                read = ((name, expert), source.read(name, expert))
            part = read[1][piece.index[len(piece.index) - len(piece.shape) :]]
            if piece.is_rearranged:
                part = piece.to_stored(part)
            tensors[piece.key] = _convert(piece.key, part, piece.dtype or dtype)
            weight_map[piece.key] = file_name
            done += tensors[piece.key].nbytes
            if on_progress is not None:
                on_progress(done, weight_bytes)
        del read
        with written_by_library(folder / file_name):
            save_file(tensors, folder / file_name, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": weight_bytes}, "weight_map": weight_map}
        write_atomically(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def _convert(key: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` in ``dtype`` with memory of its own; an error where it is not finite there."""
    converted = tensor.to(dtype, copy=True).contiguous()
    if not torch.isfinite(converted).all():
        finite = bool(torch.isfinite(tensor).all())
        reason = f"overflows {DTYPE_NAMES[dtype]}; give --dtype bf16 or fp32" if finite else "is not finite"
        raise CheckpointError(f"tensor '{key}' {reason}; nothing was exported")
    return converted


def _check_written(folder: Path, shards: list[_Shard], dtype: torch.dtype) -> None:
    """Raise CheckpointError unless the folder, opened as any other, holds every tensor."""
    expected = {piece.key: (piece.shape, piece.dtype or dtype) for shard in shards for _, piece in shard}
    found = {key: (stored.shape, stored.dtype) for key, stored in read_headers(folder).items()}
    for key in expected.keys() | found.keys():
        if expected.get(key) != found.get(key):
            raise CheckpointError(f"{folder}: tensor '{key}' was read back as {found.get(key)}; export again")


def _find_companions(reference: Path) -> list[Path]:
    """Everything of the reference folder that is not a weight.

    Raises ConfigError naming a link that leads out of the folder: an export is published, what lies elsewhere is not
    meant to be. In the hub's cache the files of a model are links to its own ``blobs``.
    """
    roots = [reference.resolve()]
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parent.parent / "blobs")
    found = []
    for path in sorted(reference.iterdir()):
        if path.name.startswith(".") or path.name.endswith(WEIGHT_ENDINGS) or not path.is_file():
            continue
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise ConfigError(
                f"{path}: is a link to {path.resolve()}, out of the model's folder, so it is not exported; put a copy "
                "in its place, or remove it"
            )
        found.append(path)
    return found


def _copy_companions(companions: Iterable[Path], reference: Path, folder: Path, dtype: torch.dtype) -> None:
    for path in companions:
        shutil.copyfile(path, folder / path.name)
    document = read_hf_config(reference)
    name = "dtype" if "dtype" in document else "torch_dtype"
    quantized = document.pop("quantization_config", None)
    if quantized is not None or document.get(name) != DTYPE_NAMES[dtype]:
        document[name] = DTYPE_NAMES[dtype]
        write_atomically(folder / CONFIG_FILE, json.dumps(document, indent=2) + "\n")
