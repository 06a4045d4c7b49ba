"""Reads the safetensors shards of a Hugging Face folder: headers with checks, then tensors one at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from safetensors import SafetensorError, safe_open

from moescale.errors import CheckpointError
from moescale.records import FileKind, Length, RelativePath, build, read_json_object

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
WEIGHT_ENDINGS = (".safetensors", ".index.json", *_OTHER_FORMATS)
"""Endings of files of weights and of their indices."""
Progress = Callable[[int, int], None]
"""Called with the bytes of weights processed so far, and their total."""
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file, as described by the file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class _Index:
    """The field of an index that is read: the file of each tensor, relative to the index's folder."""

    weight_map: Annotated[dict[str, RelativePath], Length(least=1)]


_INDEX = FileKind(
    noun="an index of weights",
    error=CheckpointError,
    remedy="fetch the index again",
    max_bytes=2**28,
    ignores_unknown=True,
)


def read_headers(folder: Path, may_be_absent: Collection[str] = ()) -> dict[str, StoredTensor]:
    """Return every tensor of the folder's shards by name, from their headers.

    Args:
        may_be_absent: tensors that the index may list although no shard has them, as some tied models do.

    Raises CheckpointError if a shard is missing or truncated, a dtype is not supported, two shards hold the same
    tensor, or the index contradicts the shards.
    """
    index = _read_index(folder)
    paths = sorted({folder / name for name in index.values()}) if index else _unindexed_shards(folder)
    found: dict[str, StoredTensor] = {}
    for path in paths:
        for name, tensor in _read_header(path):
            if name in found:
                raise CheckpointError(
                    f"{path}: tensor '{name}' is also in {found[name].file.name}; keep one of the two"
                )
            found[name] = tensor
    for name, file_name in index.items():
        if name in found and found[name].file == folder / file_name:
            continue
        if name in found:
            raise CheckpointError(
                f"{folder / file_name}: lacks tensor '{name}', which {INDEX_FILE} says it holds and {found[name].file} "
                "has: the two are of different downloads; fetch the index and these files again"
            )
        if name not in may_be_absent:
            raise CheckpointError(
                f"{folder / file_name}: lacks tensor '{name}', which {INDEX_FILE} says it holds: one of the two is of "
                "another download or a left-over; fetch both again"
            )
    return found


def has_weights(folder: Path) -> bool:
    """Return True if the folder has any file of weights: in any format, or left by an interrupted download."""
    return any(path.name.endswith(WEIGHT_ENDINGS) for path in folder.iterdir())


def read_parts(file: Path, parts: Iterable[tuple[str, tuple[slice, ...]]]) -> Iterator[torch.Tensor]:
    """Yield the given part of each named tensor of one shard, on the CPU. The file is mapped until the last one."""
    try:
        with safe_open(file, framework="pt") as shard:
            for name, index in parts:
                yield shard.get_slice(name)[index]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); fetch it again") from error


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX_FILE
    if not path.is_file():
        return {}
    weight_map = build(_Index, read_json_object(path, _INDEX), str(path), _INDEX).weight_map
    for name, file_name in weight_map.items():
        if not (folder / file_name).is_file():
            raise CheckpointError(f"{folder / file_name}: missing; {INDEX_FILE} says it holds '{name}'")
    return weight_map


def _unindexed_shards(folder: Path) -> list[Path]:
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        other = next((path for path in sorted(folder.iterdir()) if path.name.endswith(_OTHER_FORMATS)), None)
        hint = f"; convert {other.name} to safetensors" if other else "; fetch the folder again"
        raise CheckpointError(f"{folder}: holds no *.safetensors weights{hint}")
    raise CheckpointError(
        f"{folder}: has {len(shards)} shards ({shards[0].name}, ...) but no {INDEX_FILE}; fetch the index too"
    )


def _read_header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():
                stored = shard.get_slice(name)
                dtype = stored.get_dtype()
                if dtype not in DTYPES:
                    raise CheckpointError(
                        f"{path}: tensor '{name}' has dtype {dtype}; supported are {', '.join(DTYPES)}"
                    )
                yield name, StoredTensor(file=path, shape=tuple(stored.get_shape()), dtype=DTYPES[dtype])
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or damaged ({error}); fetch it again") from error
