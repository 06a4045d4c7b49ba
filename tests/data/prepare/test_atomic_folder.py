"""An interrupted preparation leaves nothing that opens, and nothing in the way of the next one."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moescale.data.corpus import open_corpus
from moescale.data.prepare import prepare
from moescale.errors import DataError
from moescale.files import staging_path

PREPARE = """
import sys
from pathlib import Path
from moescale.data.prepare import prepare
from moescale.data.prepare.settings import PrepareSettings
if __name__ == "__main__":
    source, tokenizer, output = sys.argv[1:]
    prepare(
        PrepareSettings(source=source, tokenizer=tokenizer, sequence_length=16, output=Path(output), num_workers=2),
        progress=False,
    )
"""


@pytest.fixture
def large_source(tmp_path: Path) -> Path:
    """Large enough to be interrupted in the middle: 60 MB, several seconds of work."""
    source = tmp_path / "large.jsonl"
    line = json.dumps({"text": "".join(f"word{number} " for number in range(2000))}) + "\n"
    source.write_text(line * 4_000)
    return source


def start(tmp_path: Path, source: Path, model_folder: Path) -> subprocess.Popen:
    script = tmp_path / "script.py"
    script.write_text(PREPARE)
    arguments = [sys.executable, script, source, model_folder, tmp_path / "output"]
    return subprocess.Popen(list(map(str, arguments)), start_new_session=True, stderr=subprocess.DEVNULL)


def wait_until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def processes_of_session(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = entry.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(entry.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for left-over processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_an_interrupted_call_leaves_no_corpus_and_no_process(tmp_path, large_source, model_folder, settings, number):
    output, staging = tmp_path / "output", staging_path(tmp_path / "output")
    process = start(tmp_path, large_source, model_folder)
    wait_until(lambda: (staging / "train-00000.bin").exists())
    os.kill(process.pid, number)
    process.wait()
    assert not output.exists()
    with pytest.raises(DataError, match="output is not a folder"):
        open_corpus(output)
    wait_until(lambda: not processes_of_session(process.pid))
    assert staging.exists() == (number == signal.SIGKILL)
    if staging.exists():
        with pytest.raises(DataError, match="is not a prepared corpus"):
            open_corpus(staging)

    small = tmp_path / "small.txt"
    small.write_text("some text " * 50)
    prepare(settings(small), progress=False)
    assert open_corpus(output).num_sequences > 0
    assert not staging.exists()
    assert not any("large" in path.read_text(errors="ignore") for path in output.iterdir())


def test_what_a_killed_call_left_does_not_get_into_the_corpus(settings, tmp_path, lines_file):
    staging = staging_path(tmp_path / "output")
    (staging / "folder").mkdir(parents=True)
    (staging / "train-00007.bin").write_bytes(b"left over")
    output = prepare(settings(lines_file), progress=False).output
    assert sorted(path.name for path in output.iterdir()) == ["manifest.json", "source.jsonl", "train-00000.bin"]


def test_two_calls_at_once_do_not_mix(settings, tmp_path, lines_file):
    staging = staging_path(tmp_path / "output")
    staging.mkdir()
    lock = os.open(staging, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another process is preparing .*output"):
        prepare(settings(lines_file), progress=False)
    os.close(lock)
    assert prepare(settings(lines_file), progress=False).documents == 60


def test_a_full_disk_is_an_error_with_a_remedy_and_leaves_nothing(settings, tmp_path, lines_file):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            DataError, match=r"train-00000.bin cannot be written: File too large; free disk space .*output"
        ):
            prepare(settings(lines_file), progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == [lines_file.name]


def test_a_manifest_that_cannot_be_written_leaves_nothing(settings, tmp_path, lines_file, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moescale.data.corpus.manifest.Manifest.write", fail)
    with pytest.raises(DataError, match=r"cannot be written: No space left on device; free disk space"):
        prepare(settings(lines_file), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [lines_file.name]


@pytest.mark.parametrize("output", ["file/corpus", "/proc/corpus"])
def test_an_output_that_cannot_be_made_is_named(settings, tmp_path, lines_file, output):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(DataError, match=f"{output} cannot be written: .*; free disk space .* choose another output"):
        prepare(settings(lines_file, output=tmp_path / output), progress=False)
    assert (tmp_path / "file").read_text() == "precious"


def test_the_working_directory_is_refused_before_the_work(settings, tmp_path, lines_file, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output in (Path("."), tmp_path / "here"):
        with pytest.raises(DataError, match=r"output \(.*\) is the working directory .*; name a folder in it, such as"):
            prepare(settings(lines_file, output=output), progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [lines_file.name, "here"]
    assert list((tmp_path / "here").iterdir()) == []


def test_an_output_behind_a_link_is_made_where_the_link_leads(settings, tmp_path, lines_file):
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "output").symlink_to(tmp_path / "large_disk")
    prepare(settings(lines_file), progress=False)
    assert (tmp_path / "output").is_symlink()
    assert open_corpus(tmp_path / "large_disk").num_sequences > 0
