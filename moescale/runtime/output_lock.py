"""One run at a time in an output folder: two would remove each other's unfinished checkpoints."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moescale.errors import ConfigError
from moescale.runtime.ranks import ONE_RANK, Ranks

LOCK_FILE = "run.lock"


@contextmanager
def hold_output(output: Path, ranks: Ranks = ONE_RANK) -> Iterator[None]:
    """Keep ``output`` to this run while the context lasts. A collective; the first rank holds the lock.

    The kernel gives the lock up when the process is gone, however it went; the file that stays means nothing by
    itself. Raises ConfigError, the same on every rank, where another process holds it.
    """
    descriptor, problem = _lock(output) if ranks.is_first else (None, None)
    try:
        problem = ranks.gather(problem)[0]
        if problem is not None:
            raise ConfigError(problem)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(output: Path) -> tuple[int | None, str | None]:
    path = output / LOCK_FILE
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        return None, f"--output ({output}) must be a folder that can be written to ({error}); choose another"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        os.close(descriptor)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return None, None  # a file system without locks: better a run without one than none
        return None, (
            f"--output ({output}): another process trains into it ({holder or 'unknown'}, which holds {path}); wait "
            "for its end, or choose another --output"
        )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor, None
