"""The progress bar of `prepare`."""

from __future__ import annotations

import time
from types import TracebackType

from rich import progress as rich_progress
from rich.console import Console


class Progress:
    """Shows how much of the source is read, with documents/s and tokens/s; on standard error, or not at all."""

    def __init__(self, total_bytes: int | None, visible: bool) -> None:
        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("preparing"),
            rich_progress.BarColumn(),
            rich_progress.DownloadColumn(),
            rich_progress.TextColumn("{task.fields[speed]}"),
            rich_progress.TimeRemainingColumn(),
            console=Console(stderr=True, markup=False, emoji=False),
            disable=not visible,
        )
        self._task = self._bar.add_task("prepare", total=total_bytes, speed="")
        self._documents = self._tokens = 0
        self._began = time.monotonic()

    def __enter__(self) -> Progress:
        self._bar.start()
        self._began = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, *, num_bytes: int, documents: int, tokens: int) -> None:
        self._documents += documents
        self._tokens += tokens
        seconds = max(time.monotonic() - self._began, 1e-9)
        speed = f"{self._documents / seconds:,.0f} documents/s {self._tokens / seconds:,.0f} tokens/s"
        self._bar.update(self._task, advance=num_bytes, speed=speed)
