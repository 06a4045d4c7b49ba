"""Runs one command again and again, each time killed before another of its file operations, and then once more.

Started by test_kill_points.py with kill_before.c preloaded. One process forks a child for each point: a start of Python
and its libraries for each would take an hour.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch.utils.tensorboard  # noqa: F401 - imported here once, not in every child

from moescale import cli
from moescale.runtime.checkpoint import CheckpointStore, verify

STEPS, RESUMED_AT = 3, 2


def in_child(work: Callable[[], None]) -> int:
    """Exit status of a child that does ``work``, negative where a signal ended it."""
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
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Attack:
    def __init__(self, library: str, folder: Path, model: str, corpus: str, command: str) -> None:
        self.library = ctypes.CDLL(library)
        self.work, self.before, self.command = folder / "work", folder / "before", command
        self.run, self.export = self.work / "run", self.work / "export"
        inputs = ["--model", model, "--data", corpus, "--output", str(self.run), "--device", "cpu", "--json"]
        train = ["run", *inputs, "--checkpoint-every", "1", "--keep-checkpoints", "1", "--validation-sequences", "2"]
        self.first = [*train, "--steps", str(RESUMED_AT)]
        self.whole = [*train, "--steps", str(STEPS)]
        shards = ["--max-shard-gigabytes", "0.0002", "--dtype", "bf16", "--json"]
        exported = ["export", "--run", str(self.run), "--output", str(self.export), *shards]
        self.arguments = exported if command == "export" else self.whole

    def child(self, arguments: list[str], kill_before: int = 0, count: Path | None = None) -> int:
        def work() -> None:
            self.library.attack_begin(os.fsencode(self.work), kill_before)
            try:
                cli.main(arguments)
            finally:
                if count is not None:
                    number = self.library.attack_count()
                    self.library.attack_begin(b"", 0)
                    count.write_text(str(number))

        return in_child(work)

    def prepare(self) -> None:
        """Make what is there before the command, once."""
        self.work.mkdir()
        if self.command != "run":
            assert self.child(self.whole if self.command == "export" else self.first) == 0
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

    def check_killed(self, point: int) -> None:
        """Whatever has its final name is whole, and what was there before was not dropped for less."""
        checkpoints = CheckpointStore(self.run / "checkpoints", keep=1).list()
        for checkpoint in checkpoints:
            verify(checkpoint)
        assert checkpoints or self.command == "run", f"{point}: no checkpoint is left"

    def attack(self, every: int) -> dict[str, int]:
        self.prepare()
        count = self.before / "count"
        assert self.child(self.arguments, count=count) == 0
        reference, num_operations = self.content(), int(count.read_text())
        count.unlink()
        killed = 0
        for point in range(1, num_operations + 1, every):
            shutil.rmtree(self.work)
            shutil.copytree(self.before, self.work)
            status = self.child(self.arguments, kill_before=point)
            assert status in (0, -signal.SIGKILL), f"{point}: {status}"  # 0: a thread was faster this time
            killed += status != 0
            self.check_killed(point)
            if self.command != "export" or not self.export.exists():
                assert self.child(self.arguments) == 0, f"{point}: the restart failed"
            assert self.content() == reference, f"{point}: another result"
            left = {path.name for path in self.work.iterdir()} - {"run", "export"}
            assert not left, f"{point}: {left} is left"
        return {"operations": num_operations, "killed": killed}


if __name__ == "__main__":
    library, folder, model, corpus, command, every = sys.argv[1:]
    print(json.dumps(Attack(library, Path(folder), model, corpus, command).attack(int(every))), file=sys.__stdout__)
