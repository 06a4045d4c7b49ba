"""Worker processes that tokenise chunks, and their results in the source's order."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context, parent_process
from typing import Any

from moescale.data.prepare.encode import EncodedChunk, Encoder
from moescale.data.prepare.memory_budget import Resources
from moescale.data.prepare.sources import Source
from moescale.data.prepare.splitting import in_parts
from moescale.data.prepare.work_items import ReadableChunk
from moescale.errors import DataError

_LONG_FILE_PART_BYTES = 1 << 17
"""Size of the smallest chunks, independent of the available memory, which must not affect where a text is split."""
_worker_encoder: Encoder | None = None


def encode(source: Source, *, options: dict[str, Any], resources: Resources) -> Iterator[EncodedChunk]:
    """Yield the encoded chunks of ``source`` in order, a bounded number of them begun and not yet yielded.

    With one worker everything happens in the calling process. ``options`` are :class:`Encoder`'s other
    arguments.
    """
    options = options | {"most_document_bytes": resources.most_document_bytes}
    whole_chunks = source.chunks(resources.chunk_bytes, resources.most_document_bytes)
    if resources.num_workers == 1:
        encoder = Encoder(**options)
        chunks = in_parts(whole_chunks, encoder.tokens_of, _LONG_FILE_PART_BYTES)
        yield from map(encoder, chunks)
        return
    pool = ProcessPoolExecutor(
        resources.num_workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(options,)
    )
    own_encoder = cache(lambda: Encoder(**options))  # made when a long file comes up: it takes a second
    chunks = in_parts(whole_chunks, lambda text: own_encoder().tokens_of(text), _LONG_FILE_PART_BYTES)
    begun: deque[Future[EncodedChunk]] = deque()
    try:
        for chunk in chunks:
            begun.append(pool.submit(_encode_in_worker, chunk))
            if len(begun) >= resources.max_in_flight:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a tokenising process was ended from outside, most often for lack of memory: lower memory_gigabytes or "
            "num_workers (a script that calls prepare() must do so under `if __name__ == '__main__'`)"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(options: dict[str, Any]) -> None:
    global _worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_encoder = Encoder(**options)


def _leave_with_parent() -> None:
    """A pool's workers hold both ends of its queue and would outlive a parent that was killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(chunk: ReadableChunk) -> EncodedChunk:
    assert _worker_encoder is not None
    return _worker_encoder(chunk)
