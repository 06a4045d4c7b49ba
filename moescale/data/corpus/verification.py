"""Verifies corpora while a run trains on them, so that damage is found in the first epoch and not in the model.

A small corpus is verified before the run begins. A large one is verified by a thread, whose work (hashing and looking
for the largest id) leaves Python's lock alone; an error is raised in the next step. The loader waits for the thread
where an epoch ends: no sequence is used twice before the whole corpus has been verified once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from moescale.data.corpus.corpus import Corpus

_AT_ONCE_BYTES = 256 << 20


class Verification:
    """One process's part of verifying ``corpora``; a context manager that ends its thread.

    Args:
        part, num_parts: this process's among those that read the same files.
        on_progress: called now and then while there is something to wait for.

    Raises:
        DataError: a corpus that is small enough to be verified at once is damaged.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        *,
        part: int = 0,
        num_parts: int = 1,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.num_bytes = sum(corpus.num_bytes for corpus in corpora)
        self.verified_bytes = 0
        self._pieces = [corpus.verifying(part, num_parts) for corpus in corpora]
        self._on_progress = on_progress
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._verify, name="moescale-verification", daemon=True)
        self._thread.start()
        if self.num_bytes <= _AT_ONCE_BYTES:
            self.wait()

    def __enter__(self) -> Verification:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive() and self._error is None

    def check(self) -> None:
        """Raise the damage that has been found so far."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Raise the damage there is, when everything has been read."""
        while self._thread.is_alive():
            self._on_progress()
            self._thread.join(1.0)
        self.check()

    def _verify(self) -> None:
        try:
            for pieces in self._pieces:
                for num_bytes in pieces:
                    self.verified_bytes += num_bytes
                    if self._stopped.is_set():
                        return
        except BaseException as error:  # of any type: raised again by check() and wait()
            self._error = error
