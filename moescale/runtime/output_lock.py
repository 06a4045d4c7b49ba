"""Allows one run at a time in an output folder: two would remove each other's unfinished checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from moescale.errors import ConfigError
from moescale.files import InUseError, lock_file
from moescale.runtime.ranks import ONE_RANK, Ranks

LOCK_FILE = "run.lock"


@contextmanager
def hold_output(output: Path, ranks: Ranks = ONE_RANK) -> Iterator[None]:
    """Lock ``output`` for this run inside the context. A collective; the first rank holds the lock.

    Raises the same ConfigError on every rank if another process holds it.
    """
    with ExitStack() as stack:
        problem = _hold(output, stack) if ranks.is_first else None
        problem = ranks.gather(problem)[0]
        if problem is not None:
            raise ConfigError(problem)
        yield


def _hold(output: Path, stack: ExitStack) -> str | None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        stack.enter_context(lock_file(output / LOCK_FILE))
    except InUseError as error:
        return (
            f"--output ({output}): another process trains into it ({error.holder or 'unknown'}, which holds "
            f"{error.path}); wait for its end, or choose another --output"
        )
    except OSError as error:
        return f"--output ({output}) must be a folder that can be written to ({error}); choose another"
    return None
