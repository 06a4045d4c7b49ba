"""moescale as a user starts it: the command lines, the steps that a run has made so far, and an end to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


def moescale(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "moescale", *map(str, arguments)]


def torchrun(ranks: int, script: Path, *arguments: object) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*launcher, str(script), *map(str, arguments)]


def log_of(output: Path) -> Path:
    """Where :func:`start` writes what the run with this output folder prints."""
    return output.parent / f"{output.name}.log"


def start(command: list[str], output: Path) -> subprocess.Popen[bytes]:
    with log_of(output).open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def read_steps(output: Path) -> list[dict[str, Any]]:
    """The records of the steps that a run has made, so far."""
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    records = (json.loads(line) for line in lines if line.endswith("\n"))
    return [record for record in records if "step_seconds" in record]


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all that it has started: ranks may be in sessions of their own."""
    for pid in [process.pid, *descendants(process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # ended meanwhile
            continue
    process.wait()


def descendants(pid: int) -> list[int]:
    """The processes that ``pid`` and its children have started, and that live."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in path.read_text().split()]
        except OSError:  # ended meanwhile
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def rank_process(pid: int, rank: int) -> int | None:
    """The process of ``rank`` below ``pid``."""
    for child in descendants(pid):
        try:
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile
            continue
        if f"RANK={rank}".encode() in environment:
            return child
    return None
