"""`prepare` killed before any of its file operations leaves nothing that opens; the next call makes the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# One process forks a child for each point: a start of Python and its libraries for each would take minutes.
ATTACK = """
import builtins, json, os, signal, sys
from pathlib import Path
from moescale.data.corpus import open_corpus, verify
from moescale.data.prepare import PrepareSettings, memory_budget, prepare, shard_writer
from moescale.errors import DataError

folder, tokenizer, every, num_workers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
shard_writer._SHARD_TOKENS, shard_writer._WRITE_TOKENS = 16 * 60, 2000
output = folder / "work" / "output"
settings = PrepareSettings(
    source=str(folder / "documents.jsonl"), tokenizer=tokenizer, sequence_length=16, output=output,
    validation_fraction=0.3, document_boundaries=True, num_workers=num_workers,
)
done = 0


def operation(name):
    global done
    done += 1
    if done == kill_before:
        os.kill(os.getpid(), signal.SIGKILL)


class CountedFile:
    def __init__(self, file):
        self.file = file
    def write(self, content):
        operation("write")
        return self.file.write(content)
    def flush(self):
        operation("flush")
        return self.file.flush()
    def close(self):
        operation("close")
        return self.file.close()
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.close()
    def __getattr__(self, name):
        return getattr(self.file, name)


def count_operations():
    names = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "fcntl.flock", "os.truncate")
    sys.addaudithook(lambda event, arguments: operation(event) if event in names else None)
    sync, open_file = os.fsync, builtins.open
    os.fsync = lambda descriptor: (operation("fsync"), sync(descriptor))[1]
    def counted_open(path, mode="r", *more, **options):
        if "w" not in mode:
            return open_file(path, mode, *more, **options)
        operation("open")
        return CountedFile(open_file(path, mode, *more, **options))
    builtins.open = counted_open


def in_child(work):
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def counted_prepare():
    count_operations()
    prepare(settings, progress=False)
    (folder / "count").write_text(str(done))


def content():
    return {path.name: path.read_bytes() for path in output.iterdir()}


kill_before = None


def attack():
    global kill_before
    assert in_child(counted_prepare) == 0
    reference, num_points = content(), int((folder / "count").read_text())
    points = [*range(1, num_points + 1, every)]
    opened = 0
    for kill_before in points:
        for path in output.iterdir():
            path.unlink()
        output.rmdir()
        assert in_child(counted_prepare) == -signal.SIGKILL, kill_before
        try:
            verify(open_corpus(output))
            opened += 1
            assert content() == reference, kill_before
        except DataError:
            assert not output.exists(), kill_before
        assert in_child(lambda: prepare(settings, progress=False)) == 0, kill_before
        assert content() == reference, kill_before
        assert [path.name for path in output.parent.iterdir()] == ["output"], kill_before
    print(json.dumps({"operations": num_points, "killed": len(points), "whole_when_killed": opened}))


if __name__ == "__main__":
    attack()
"""


@pytest.mark.parametrize(
    "every, num_workers",
    [(9, 1), pytest.param(1, 1, marks=pytest.mark.slow), pytest.param(9, 2, marks=pytest.mark.slow)],
)
def test_killed_before_any_file_operation_and_called_again_every_byte_is_the_same(
    tmp_path, lines_file, model_folder, every, num_workers
):
    (tmp_path / "work").mkdir()
    (tmp_path / "script.py").write_text(ATTACK)
    command = [sys.executable, tmp_path / "script.py", tmp_path, model_folder, every, num_workers]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    counted = json.loads(done.stdout)
    assert counted["operations"] > 60 and counted["killed"] == -(-counted["operations"] // every)
    assert counted["whole_when_killed"] <= 2  # after the rename nothing is left to do but to sync the folder's name
    print(counted)
