"""Writing a folder whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moescale.errors import DataError


def staging_folder(output: Path) -> Path:
    """The hidden folder beside ``output`` in which it is made."""
    return output.parent / f".{output.name}.incomplete"


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yield a hidden folder beside ``output`` that takes its name when the block ends, and goes when it fails.

    What an earlier process left there when it was killed is removed first; a process that is still at work holds a
    lock, which the kernel releases however that process ends.

    Raises:
        DataError: another process is writing the same ``output``.
    """
    folder = staging_folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another process is preparing {output}; wait for it, or choose another output") from error
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        try:
            yield folder
            _sync(folder)
            os.rename(folder, output)
            _sync(output.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _sync(folder: Path) -> None:
    """Make the folder's files and names durable."""
    for path in [*folder.glob("*.json*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
