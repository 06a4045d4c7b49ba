"""Profiles a few steps of a run: a trace, a memory snapshot, and the time of every kernel.

The trace opens in https://ui.perfetto.dev, the snapshot in https://pytorch.org/memory_viz. Profiling adds host time to
a step, but not to a micro-batch that is replayed as a CUDA graph.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from moescale.errors import printable
from moescale.files import write_atomically
from moescale.runtime.hooks import TrainerHook, Update

WARM_UP_STEPS = 3
"""Steps before the first profiled one: they compile, capture graphs and fill caches."""
MAX_MEMORY_EVENTS = 200_000
KERNELS_FILE, TRACE_FILE, MEMORY_FILE = "kernels.json", "trace.json.gz", "memory.pickle"


class StepProfiler(TrainerHook, AbstractContextManager):
    """Profiles ``num_steps`` steps after the warm-up of this process and writes into ``folder``.

    A context manager around the training; it discards a profile that is incomplete at the end.

    ``kernels.json`` lists name, launches and microseconds of each kernel on the device (on a CPU: of each operator),
    and the total seconds of the profiled steps. Only the first rank writes.
    """

    def __init__(self, folder: Path, num_steps: int, device: torch.device, *, is_first: bool) -> None:
        self.folder = folder
        self.num_steps = num_steps
        self.device = device
        self.is_first = is_first
        self.is_done = False
        """True once all steps are profiled and the files are written."""
        self._seen = 0
        self._profile: profile | None = None

    def after_update(self, update: Update) -> None:
        self._seen += 1
        if self._seen == WARM_UP_STEPS and self.is_first:
            self._start()
        elif self._seen == WARM_UP_STEPS + self.num_steps and self._profile is not None:
            self._stop(last_step=update.step)

    def __exit__(self, *_: object) -> None:
        if self._profile is not None:
            self._end()
            self._profile = None

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS, device=self.device)
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.__enter__()

    def _stop(self, *, last_step: int) -> None:
        assert self._profile is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.memory._dump_snapshot(str(self.folder / MEMORY_FILE))
        self._end()
        self._profile.export_chrome_trace(str(self.folder / TRACE_FILE))
        document = {
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "first_step": last_step - self.num_steps + 1,
            "steps": self.num_steps,
            "kernels": kernel_times(self._profile, on_device=self.device.type == "cuda"),
        }
        write_atomically(self.folder / KERNELS_FILE, json.dumps(document, indent=1) + "\n")
        self._profile = None
        self.is_done = True

    def _end(self) -> None:
        assert self._profile is not None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._profile.__exit__(None, None, None)
        if self.device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None, device=self.device)


def kernel_times(profiled: profile, *, on_device: bool) -> list[dict[str, Any]]:
    """Return name, launches and microseconds of every kernel (on a CPU: operator), the longest first."""
    rows = []
    for event in profiled.key_averages():
        if on_device:
            # NCCL marks its collectives with spans on the device; their kernels are listed already.
            if event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation:
                continue
            microseconds = event.self_device_time_total
        else:
            microseconds = event.self_cpu_time_total
        if microseconds > 0:
            rows.append({"name": printable(event.key), "launches": event.count, "microseconds": microseconds})
    return sorted(rows, key=lambda row: row["microseconds"], reverse=True)
