"""A progress bar over bytes, for what reads or writes whole models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@contextmanager
def bytes_progress(description: str, *, show: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield a function to call with (bytes done, bytes in all); nothing is drawn unless ``show``."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True, markup=False, emoji=False)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not show) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
