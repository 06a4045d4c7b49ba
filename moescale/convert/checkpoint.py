"""Hugging Face checkpoint folder -> model, and back: streamed, checked before anything is written, exact.

Import: every name, shape and dtype is checked from the shards' headers, then each tensor is copied into its part of a
parameter; one shard is mapped at a time. Export: shards are planned from shapes, then filled and written one at a time
in a hidden folder that takes the final name when all is on disk, by one process at a time.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from moescale.boxes import Box, box_shape, overlap, relative_to, whole_box
from moescale.config import ModelConfig
from moescale.convert.hf_config import CONFIG_FILE, read_hf_config, read_model_config, transformers_differences
from moescale.convert.key_table import KeyTable, Piece, build_key_table, fused_experts, mxfp4_experts
from moescale.convert.mxfp4 import dequantize
from moescale.convert.weight_files import (
    INDEX_FILE,
    SINGLE_FILE,
    WEIGHT_ENDINGS,
    StoredTensor,
    has_weights,
    read_headers,
    read_parts,
)
from moescale.errors import CheckpointError, ConfigError, NonFiniteWeightsError
from moescale.files import InUseError, remedy, staged_folder, staging_path, write_atomically, written_by_library
from moescale.models.family import HfNames
from moescale.models.registry import family_of, find_family

_RECOMPUTED = re.compile(r"rotary_emb\.inv_freq$")
"""Buffers some published folders carry; the model computes them."""
_DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


class TensorSource(Protocol):
    """Where exported weights come from: a checkpoint of a run, or a model in memory."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """The parameter on the CPU, or with ``index`` its slice of dim 0."""
        ...


class ModelWeights:
    """The parameters of a model in memory as a :class:`TensorSource`."""

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._parameters = parameters

    def names(self) -> Iterable[str]:
        return self._parameters.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._parameters[name].shape)

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        parameter = self._parameters[name].detach()
        return (parameter if index is None else parameter[index]).cpu()


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export wrote."""

    output: Path
    num_tensors: int
    num_shards: int
    weight_bytes: int
    warnings: tuple[str, ...]
    """Where transformers will compute something else than this model was trained as, and what was not trained."""


@torch.no_grad()
def import_checkpoint(
    folder: Path,
    config: ModelConfig,
    parameters: Mapping[str, torch.Tensor],
    *,
    parts: Mapping[str, Box] | None = None,
    on_progress: Progress | None = None,
) -> None:
    """Copy the weights of a Hugging Face folder into ``parameters``, converted to their dtype, on their device.

    What the folder holds of layers for multi-token prediction (:func:`kept_tensors`) is left alone.

    Args:
        parameters: by name, all of the model's, and its buffers. With ``parts`` each tensor is only the named part of
            its parameter, and only what it needs is read.
        parts: for each parameter one slice with explicit bounds per dim.

    Raises CheckpointError naming the tensor where one is missing, extra, of the wrong shape or dtype, or its file is
    truncated; no parameter has been touched then. Raises NonFiniteWeightsError naming a tensor with NaN or infinity.
    """
    table = build_key_table(config)
    stored = read_headers(folder, may_be_absent=_tied_keys(family_of(config).names) if config.tie_embeddings else ())
    table = _as_stored(table, config, stored)
    _check_stored(folder, config, table, stored)
    _check_parameters(table, parameters, parts)
    wanted: dict[Path, list[_Copy]] = {}
    for name, pieces in table.items():
        part = parts[name] if parts is not None else whole_box(parameters[name].shape)
        for piece in pieces:
            for copy in _copies_of(piece, part, parameters[name]):
                wanted.setdefault(stored[piece.key].file, []).append(copy)
    total = sum(copy.target.nbytes for copies in wanted.values() for copy in copies)
    done = 0
    for file in sorted(wanted):
        copies = wanted[file]
        tensors = read_parts(file, ((copy.key, copy.source) for copy in copies))
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.target.copy_(_values(copy, tensor, stored).view(copy.target.shape))
            if not torch.isfinite(copy.target).all():
                raise NonFiniteWeightsError(
                    f"{file}: tensor '{copy.key}' has values that are not finite, or not in {copy.target.dtype}; fetch "
                    "the folder again, or ask who made it"
                )
            done += copy.target.nbytes
            if on_progress is not None:
                on_progress(done, total)


@torch.no_grad()
def check_output(output: Path) -> None:
    """Raise CheckpointError unless ``output`` can become the folder of an export: absent or empty."""
    # A folder such as "." has a name once it is resolved; "/" has none.
    if not output.resolve().name or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise CheckpointError(f"{output}: already exists; give another --output, or remove it")


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
        output: must not exist, or be empty; appears whole or not at all.
        reference: folder whose config.json, tokenizer, generation and code files are copied; its config.json is
            copied byte for byte unless ``dtype`` differs from the one it names.
        dtype: of the written weights, whatever ``source`` keeps; buffers stay fp32, and what is kept of ``reference``
            (:func:`kept_tensors`) as it is there.
        max_shard_bytes: no shard holds more, except one tensor that is larger by itself. Host memory: one shard, and
            one parameter (of stacked experts: one expert) beside it.

    Raises CheckpointError naming the tensor where one is missing, extra, of the wrong shape, not finite, or overflows
    ``dtype``; ConfigError where ``reference`` describes another model, or has files that lie elsewhere.
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
    try:
        with staged_folder(output) as folder:
            _copy_companions(companions, reference, folder, dtype)
            _write_shards(shards, _WithKept(source, kept), folder, dtype, weight_bytes, on_progress)
            _check_written(folder, shards, dtype)
    except InUseError as error:
        raise CheckpointError(
            f"{output}: another process is exporting to it (it holds {staging_path(output)}); wait for its end, or "
            "give another --output"
        ) from error
    except (OSError, SafetensorError) as error:  # the latter is what a full disk becomes while a shard is written
        advice = remedy(error) or "give another --output"
        raise CheckpointError(f"{output}: could not be written ({error}); {advice}") from error
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
    """Say what the export holds of layers for multi-token prediction."""
    if not config.num_prediction_layers:
        return []
    if num_kept:
        return [f"multi-token prediction was not trained: its {num_kept} tensors are those of {reference}, unchanged"]
    return [f"{reference} holds no tensors for multi-token prediction, so the export has none"]


def _unpacked(reference: Path, dtype: torch.dtype) -> list[str]:
    """Say that weights which the reference holds in fewer bits were written whole."""
    if read_hf_config(reference).get("quantization_config") is None:
        return []
    return [f"{reference} describes experts in MXFP4; this export holds them in {_DTYPE_NAMES[dtype]}, not quantized"]


def folder_dtype(folder: Path) -> torch.dtype:
    """The dtype of a folder's weights: the one its config.json names, else that of most of its values, else bf16.

    Raises CheckpointError where config.json names none and the weights are damaged.
    """
    document = read_hf_config(folder)
    name = str(document.get("dtype") or document.get("torch_dtype")).removeprefix("torch.")
    named = next((dtype for dtype, known in _DTYPE_NAMES.items() if known == name), None)
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
class _Copy:
    key: str
    source: Box
    """The part of the stored tensor to read."""
    target: torch.Tensor
    """The view of the parameter it goes to."""
    rearranged: Piece | None = None
    """The piece whose order is to be undone, after which ``wanted`` of the expert's dims is taken."""
    wanted: Box = ()


def _copies_of(piece: Piece, part: Box, parameter: torch.Tensor) -> Iterable[_Copy]:
    """What of ``piece`` lies in ``part`` of its parameter: experts in another order one by one, to save memory."""
    common = overlap(piece.index, part)
    if common is None:
        return
    if piece.is_rearranged:
        rest = tuple(slice(0, size) for size in piece.shape[1:])
        for expert in range(common[0].start, common[0].stop):
            number = slice(expert, expert + 1)
            yield _Copy(
                key=piece.key,
                source=(number, *rest),
                target=parameter.detach()[relative_to((number, *common[1:]), part)],
                rearranged=piece,
                wanted=(slice(0, 1), *common[1:]),
            )
        return
    inside = relative_to(common, piece.index)
    # A stored expert has no expert dim: its index there is the single 0:1.
    yield _Copy(
        key=piece.key,
        source=inside[len(inside) - len(piece.shape) :],
        target=parameter.detach()[relative_to(common, part)],
    )


def _values(copy: _Copy, tensor: torch.Tensor, stored: Mapping[str, StoredTensor]) -> torch.Tensor:
    """What was read, unpacked and in the parameter's order."""
    piece = copy.rearranged
    if piece is None:
        return tensor
    if piece.scales is not None:
        (scales,) = read_parts(stored[piece.scales].file, [(piece.scales, copy.source[:-1])])
        tensor = dequantize(tensor, scales)
    return piece.to_parameter(tensor)[copy.wanted]


def _tied_keys(names: HfNames) -> tuple[str, str]:
    return names.embedding, names.output


def _as_stored(table: KeyTable, config: ModelConfig, stored: Mapping[str, StoredTensor]) -> KeyTable:
    """The table with the keys of this folder, where it has another of the known layouts of the same weights.

    A tied embedding may be stored under the output's name; transformers 5 also writes a layer's experts fused.
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
    """A tied model may carry its embedding twice, if it is the same."""
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


def _check_parameters(table: KeyTable, parameters: Mapping[str, torch.Tensor], parts: Mapping[str, Box] | None) -> None:
    """The model and the table come from one configuration, so a difference is an error of the caller."""
    for name, pieces in table.items():
        shape = tuple(max(piece.index[dim].stop for piece in pieces) for dim in range(len(pieces[0].index)))
        if parts is not None:
            shape = box_shape(parts[name])
        if name not in parameters or tuple(parameters[name].shape) != shape:
            found = tuple(parameters[name].shape) if name in parameters else "none"
            raise CheckpointError(f"parameter '{name}' of the model must have shape {shape}, it has {found}")


def _check_source(table: KeyTable, source: TensorSource) -> None:
    names = set(source.names())
    for problem, difference in (("lack", table.keys() - names), ("have an unknown", names - table.keys())):
        if difference:
            raise CheckpointError(f"the weights {problem} parameter '{min(difference)}' ({len(difference)} in all)")
    for name, pieces in table.items():
        shape = tuple(max(piece.index[dim].stop for piece in pieces) for dim in range(len(pieces[0].index)))
        if source.shape(name) != shape:
            raise CheckpointError(f"parameter '{name}' has shape {source.shape(name)}, the model wants {shape}")


def kept_tensors(folder: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """Return what a folder holds of layers for multi-token prediction, which are not trained: an export keeps it.

    Empty where the folder holds no weights. Raises CheckpointError where they are damaged.
    """
    if not config.num_prediction_layers or not has_weights(folder):
        return {}
    kept = _of_prediction_layers(config)
    stored = read_headers(folder, may_be_absent=_tied_keys(family_of(config).names))
    return {key: tensor for key, tensor in stored.items() if key.startswith(kept)}


def _of_prediction_layers(config: ModelConfig) -> tuple[str, ...]:
    """How the names of tensors of the layers behind the last one begin."""
    prefix = family_of(config).names.layer_prefix
    behind = range(config.num_layers, config.num_layers + config.num_prediction_layers)
    return tuple(prefix.format(layer=layer) for layer in behind)


class _WithKept:
    """A source of weights, and beside them tensors of another folder as they are."""

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
        reason = f"overflows {_DTYPE_NAMES[dtype]}; give --dtype bf16 or fp32" if finite else "is not finite"
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
    if quantized is not None or document.get(name) != _DTYPE_NAMES[dtype]:
        document[name] = _DTYPE_NAMES[dtype]
        write_atomically(folder / CONFIG_FILE, json.dumps(document, indent=2) + "\n")
