"""A progress bar over bytes, for what reads or writes whole models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@contextmanager
def bytes_progress(description: str, *, show: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield a function to call with (bytes done, bytes in all).

    Nothing is drawn unless ``show``, nor before the first call: what fails at once leaves no empty bar.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True, markup=False, emoji=False)
    progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not show)
    task = progress.add_task(description, total=None)

    def on_progress(done: int, total: int) -> None:
        progress.start()
        progress.update(task, completed=done, total=total)

    try:
        yield on_progress
    finally:
        if progress.live.is_started:
            progress.stop()
