"""Runs functions on gloo ranks: processes that stay for a whole test module, so that each case costs no start-up."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_SECONDS = 120
# Ranks are forked from a process that has imported once what each of them would import for seconds. A test process has
# one such process, so warm_start.py preloads the same.
PRELOADED = [
    *("torch.distributed.tensor", "moescale.runtime.session", "moescale.runtime.train", "pytest"),
    *("moescale.cli.run", "torch.utils.tensorboard"),
]


class GlooRanks:
    """``size`` processes in one gloo group; :meth:`run` calls a function on all and returns what they return."""

    def __init__(self, size: int) -> None:
        self.size = size
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(*args)`` on every rank; their results in order. The first failure is raised with its traceback."""
        for pipe in self._pipes:
            pipe.send((function, args))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_SECONDS):
                raise AssertionError(f"rank {rank} of {self.size} did not answer in {TIMEOUT_SECONDS} s")
            failed, value = pipe.recv()
            (failures if failed else results).append(value)
        assert not failures, failures[0]
        return results

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


def _serve(rank: int, size: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, function(*args)))
        except BaseException:
            pipe.send((True, f"on rank {rank}:\n{traceback.format_exc()}"))
