"""Stages the output folder of an export, which appears under its final name only when it is complete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from moescale.errors import CheckpointError
from moescale.files import InUseError, remedy, staged_folder, staging_path


def check_output(output: Path) -> None:
    """Raise CheckpointError unless ``output`` does not exist or is an empty folder."""
    # A folder such as "." has a name once it is resolved; "/" has none.
    if not output.resolve().name or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise CheckpointError(f"{output}: already exists; give another --output, or remove it")


@contextmanager
def staged_export(output: Path) -> Iterator[Path]:
    """Yield a hidden folder that becomes ``output`` when the block ends without an error.

    Raises CheckpointError if another process exports to ``output``, or if writing fails.
    """
    try:
        with staged_folder(output) as folder:
            yield folder
    except InUseError as error:
        raise CheckpointError(
            f"{output}: another process is exporting to it (it holds {staging_path(output)}); wait for its end, or "
            "give another --output"
        ) from error
    except (OSError, SafetensorError) as error:  # safetensors raises the latter when the disk is full
        advice = remedy(error) or "give another --output"
        raise CheckpointError(f"{output}: could not be written ({error}); {advice}") from error
