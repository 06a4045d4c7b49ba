"""Writes the corpus's folder atomically, with errors that have a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moescale.errors import DataError
from moescale.files import InUseError, staged_folder


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
            f"{path} cannot be written: {error.strerror or error}; free disk space or fix permissions, or choose "
            "another output"
        ) from error


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yield a folder next to ``output`` that takes its name when the block ends, and goes when it fails.

    Raises:
        DataError: another process is writing the same ``output``, or the system refuses to write there.
    """
    try:
        with writing(output), staged_folder(output) as folder:
            yield folder
    except InUseError as error:
        raise DataError(f"another process is preparing {output}; wait for it, or choose another output") from error
