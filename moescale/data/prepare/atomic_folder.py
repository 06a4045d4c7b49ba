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
    """The hidden folder beside ``output``, wherever a link to it leads, in which it is made."""
    resolved = output.resolve()
    return resolved.parent / f".{resolved.name}.incomplete"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write ``path`` into an error with a remedy.

    Raises:
        DataError: an OSError came out of the block.
    """
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}; make room or give the right to write there, or "
            "choose another output"
        ) from error


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yield a hidden folder beside ``output`` that takes its name when the block ends, and goes when it fails.

    What an earlier process left there when it was killed is removed first; a process that is still at work holds a
    lock, which the kernel releases however that process ends.

    Raises:
        DataError: another process is writing the same ``output``, or the system refuses to write there.
    """
    folder = staging_folder(output)
    with writing(output):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    try:
        with writing(output):
            _lock(lock, output)
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        try:
            yield folder
            with writing(output):
                _sync(folder)
                os.rename(folder, output.resolve())
                _sync(folder.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _lock(descriptor: int, output: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(f"another process is preparing {output}; wait for it, or choose another output") from error


def _sync(folder: Path) -> None:
    """Make the folder's files and names durable."""
    for path in [*folder.glob("*.json*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
