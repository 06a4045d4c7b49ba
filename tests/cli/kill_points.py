"""Runs commands again and again, each time killed before another of its file operations, and then once more.

Started by test_kill_points.py with kill_before.c preloaded. One process forks a child for each point: a start of Python
and its libraries for each would take an hour. Where the command has several ranks, each of them in turn is the victim;
the others find out by themselves, or are killed with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.utils.tensorboard  # noqa: F401 - imported here once, not in every child

import moescale.cli.export
import moescale.cli.run  # noqa: F401
from moescale import cli
from moescale.convert.hf_config import read_model_config
from moescale.runtime.checkpoint import verify
from moescale.runtime.checkpoint_store import CheckpointStore
from moescale.runtime.watchdog import RankFailure, Watchdog

STEPS, RESUMED_AT = 3, 2
Watchdog.__init__.__kwdefaults__["interval_seconds"] = 0.05  # a rank waits five of these before it calls another dead


def start_child(work: Callable[[], None]) -> int:
    """Process id of a child that does ``work`` and ends with its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except SystemExit as error:
            status = int(error.code or 0)
        finally:
            sys.stderr.flush()
            os._exit(status)
    return child


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class Attack:
    def __init__(self, library: str, folder: Path, model: str, corpus: str, command: str, plan: str, size: int) -> None:
        """``plan``: of ``size`` ranks; "" for one rank without a plan."""
        read_model_config(Path(model))  # imports the family, here once
        self.library = ctypes.CDLL(library)
        self.work, self.before, self.command, self.size = folder / "work", folder / "before", command, size
        self.run, self.export = self.work / "run", self.work / "export"
        inputs = ["--model", model, "--data", corpus, "--output", str(self.run), "--device", "cpu", "--json"]
        inputs += ["--plan", plan, "--hang-seconds", "60"] if plan else []
        train = ["run", *inputs, "--checkpoint-every", "1", "--keep-checkpoints", "1", "--validation-sequences", "2"]
        self.first = [*train, "--steps", str(RESUMED_AT)]
        self.whole = [*train, "--steps", str(STEPS)]
        shards = ["--max-shard-gigabytes", "0.0002", "--dtype", "bf16", "--json"]
        exported = ["export", "--run", str(self.run), "--output", str(self.export), *shards]
        self.arguments = exported if command == "export" else self.whole

    def start(
        self, arguments: list[str], *, victim: int = 0, kill_before: int = 0, together: bool = False
    ) -> tuple[list[int], list[int]]:
        """Exit statuses of the command's ranks, negative where a signal ended one, and their file operations.

        Args:
            victim: the rank that is killed before its operation number ``kill_before``; 0: none is.
            together: kill the other ranks as soon as the victim is dead.
        """
        counts = [self.before.with_name(f"count-{rank}") for rank in range(self.size)]
        place = {"WORLD_SIZE": str(self.size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

        def work(rank: int) -> None:
            if self.size > 1:
                os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
            self.library.attack_begin(os.fsencode(self.work), kill_before if rank == victim else 0)
            try:
                cli.main(arguments)
            finally:
                counts[rank].write_text(str(self.library.attack_count()))

        children = [start_child(lambda rank=rank: work(rank)) for rank in range(self.size)]
        statuses: dict[int, int] = {}
        while len(statuses) < self.size:
            child, status = os.wait()
            statuses[child] = os.waitstatus_to_exitcode(status)
            if together and statuses[child] == -signal.SIGKILL:
                for other in set(children) - statuses.keys():
                    os.kill(other, signal.SIGKILL)
        operations = [int(count.read_text()) if count.exists() else 0 for count in counts]
        for count in counts:
            count.unlink(missing_ok=True)
        return [statuses[child] for child in children], operations

    def finish(self, arguments: list[str]) -> list[int]:
        """Let the command end undisturbed; its file operations by rank."""
        statuses, operations = self.start(arguments)
        assert not any(statuses), statuses
        return operations

    def prepare(self) -> None:
        """Make what is there before the command, once."""
        self.work.mkdir()
        if self.command != "run":
            self.finish(self.whole if self.command == "export" else self.first)
        shutil.copytree(self.work, self.before)

    def content(self) -> dict[str, object]:
        """What must be the same however often the command was killed."""
        if self.command == "export":
            return {path.name: path.read_bytes() for path in self.export.iterdir()}
        found: dict[str, object] = {
            str(path.relative_to(self.run)): path.read_bytes() for path in self.run.rglob("*.safetensors")
        }
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        found["losses"] = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        found["checkpoints"] = sorted(path.name for path in (self.run / "checkpoints").iterdir())
        return found

    def check_killed(self, where: str) -> None:
        """Whatever has its final name is whole, and what was there before was not dropped for less."""
        checkpoints = CheckpointStore(self.run / "checkpoints", keep=1).list()
        for checkpoint in checkpoints:
            verify(checkpoint)
        assert checkpoints or self.command == "run", f"{where}: no checkpoint is left"

    def points(self, operations: list[int], every: int) -> Iterator[tuple[int, int, bool]]:
        """Victim, number of its operation, and whether the others are killed with it."""
        for victim, number in enumerate(operations):
            for index, point in enumerate(range(1, number + 1, every)):
                if every > 1 and self.size > 1:
                    yield victim, point, index % 2 == 1
                else:
                    yield from ((victim, point, together) for together in (False, True)[: self.size])

    def attack(self, every: int) -> dict[str, int]:
        self.prepare()
        operations = self.finish(self.arguments)
        reference = self.content()
        points = list(self.points(operations, every))
        killed = 0
        for victim, point, together in points:
            where = f"rank {victim}, operation {point}, the others {'too' if together else 'not'}"
            shutil.rmtree(self.work)
            shutil.copytree(self.before, self.work)
            statuses, _ = self.start(self.arguments, victim=victim, kill_before=point, together=together)
            was_killed = statuses[victim] == -signal.SIGKILL
            survivors = (-signal.SIGKILL,) if together else (0, RankFailure.exit_status)
            # Where a thread was faster this time, there are fewer operations than before and none was killed.
            expected = [survivors] * self.size if was_killed else [(0,)] * self.size
            expected[victim] = (0, -signal.SIGKILL)
            assert all(status in allowed for status, allowed in zip(statuses, expected, strict=True)), (
                f"{where}: {statuses}"
            )
            killed += was_killed
            self.check_killed(where)
            if self.command != "export" or not self.export.exists():
                self.finish(self.arguments)
            assert self.content() == reference, f"{where}: another result"
            left = {path.name for path in self.work.iterdir()} - {"run", "export"}
            assert not left, f"{where}: {left} is left"
        return {"operations": sum(operations), "points": len(points), "killed": killed}


if __name__ == "__main__":
    library, folder, model, corpus, plan, *cases = sys.argv[1:]
    counted = []
    for case in cases:
        command, size, every = case.split(":")
        inner = Path(folder, f"{command} on {size}")
        inner.mkdir()
        attack = Attack(library, inner, model, corpus, command, plan if int(size) > 1 else "", int(size))
        counted.append(attack.attack(int(every)))
    print(json.dumps(counted), file=sys.__stdout__)
