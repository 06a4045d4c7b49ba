"""What is written is whole, durable, with the umask's mode, and by one process at a time."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moescale import files
from moescale.files import InUseError, lock_file, staged_folder, sync_tree, write_atomically, written_by_library


@pytest.fixture
def synced(monkeypatch) -> list[Path]:
    """What was synced, in order."""
    paths: list[Path] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        paths.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return paths


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_files_module_imports_no_torch():
    done = subprocess.run([sys.executable, "-c", "import sys, moescale.files; sys.exit('torch' in sys.modules)"])
    assert done.returncode == 0


def test_a_file_is_synced_before_it_is_named_and_its_name_after(tmp_path, synced):
    path = tmp_path / "run.json"
    path.write_text("old")
    write_atomically(path, "grün")
    assert path.read_bytes() == "grün".encode()
    assert synced == [tmp_path / ".run.json.writing", tmp_path]
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    path.write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_replaced_and_a_link_is_followed(tmp_path):
    target, link = tmp_path / "real" / "plan.json", tmp_path / "plan.json"
    target.parent.mkdir()
    link.symlink_to(target)
    (target.parent / ".plan.json.writing").write_text("half of somethi, and longer than what comes now")
    write_atomically(link, "new")
    assert link.is_symlink() and target.read_text() == "new" and list(target.parent.iterdir()) == [target]


def test_what_is_not_a_regular_file_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(tmp_path / "pipe", "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)


def _write_many(path: Path, content: str) -> None:
    for _ in range(200):
        write_atomically(path, content * 1000)


def test_writers_of_one_file_come_one_by_one(tmp_path):
    path = tmp_path / "plan.json"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(path, letter)) for letter in "ab"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert not path.exists() or len(set(path.read_text())) == 1
    assert [writer.exitcode for writer in writers] == [0, 0] and list(tmp_path.iterdir()) == [path]


def test_every_way_to_write_gives_the_umasks_mode(tmp_path, umask):
    def write_like_safetensors(path: Path) -> None:
        temporary = path.with_name("temporary")
        os.close(os.open(temporary, os.O_CREAT, 0o600))
        temporary.rename(path)

    write_atomically(tmp_path / "atomic", "x")
    with written_by_library(tmp_path / "library"):
        write_like_safetensors(tmp_path / "library")
    with staged_folder(tmp_path / "folder") as folder:
        write_atomically(folder / "inside", "x")
    assert {mode(tmp_path / name) for name in ("atomic", "library", "folder/inside")} == {0o666 & ~umask}
    assert mode(tmp_path / "folder") == 0o777 & ~umask


def test_a_tree_is_synced_from_its_leaves_and_links_are_not_followed(tmp_path, synced):
    outside = tmp_path / "outside"
    outside.write_text("")
    tree = tmp_path / "tree"
    (tree / "inner").mkdir(parents=True)
    for name in ("a", "inner/b"):
        (tree / name).write_text("")
    (tree / "link").symlink_to(outside)
    sync_tree(tree)
    assert synced == [tree / "a", tree / "inner" / "b", tree / "inner", tree]


def test_a_staged_folder_is_synced_then_named_then_its_name_is_synced(tmp_path, synced):
    output = tmp_path / "out"
    output.mkdir()  # empty: may be replaced
    with staged_folder(output) as folder:
        (folder / "a").write_text("")
        assert not any(output.iterdir())
    staging = tmp_path / ".out.incomplete"
    assert synced == [staging / "a", staging, tmp_path]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_staged_folder_that_fails_or_finds_its_name_taken_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), staged_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="not empty"), staged_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("mine")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "theirs"


def test_what_a_killed_process_left_in_a_staged_folder_is_removed(tmp_path):
    left = tmp_path / ".out.incomplete"
    (left / "inner").mkdir(parents=True)
    (left / "inner" / "a").write_text("")
    (tmp_path / "kept").write_text("kept")
    (left / "link").symlink_to(tmp_path)
    with staged_folder(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []
    assert (tmp_path / "kept").read_text() == "kept"


def test_one_process_at_a_time_writes_a_folder(tmp_path):
    with staged_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("first")
        with pytest.raises(InUseError), staged_folder(tmp_path / "out"):
            raise AssertionError("two at once")
    assert (tmp_path / "out" / "a").read_text() == "first"


def test_a_lock_that_was_won_on_a_folder_already_renamed_is_not_one(tmp_path, monkeypatch):
    flock, renamed = fcntl.flock, []

    def after_the_other_has_finished(descriptor: int, operation: int) -> None:
        if not renamed:
            renamed.append((tmp_path / ".out.incomplete").rename(tmp_path / "out"))
            (tmp_path / "out" / "a").write_text("theirs")
        flock(descriptor, operation)

    monkeypatch.setattr(files.fcntl, "flock", after_the_other_has_finished)
    with pytest.raises(OSError, match="not empty"), staged_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("mine")
    assert (tmp_path / "out" / "a").read_text() == "theirs"


def test_a_file_system_without_locks_allows_the_first_writer_only(tmp_path, monkeypatch):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with lock_file(tmp_path / "run.lock"):
        pass
    with staged_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("first")
        with pytest.raises(InUseError), staged_folder(tmp_path / "out"):
            raise AssertionError("two at once")
    assert (tmp_path / "out" / "a").read_text() == "first"


def test_a_lock_names_its_holder_and_goes_with_its_process(tmp_path):
    path = tmp_path / "run.lock"
    program = "import sys, time; from pathlib import Path; from moescale.files import lock_file\n"
    program += f"with lock_file(Path({str(path)!r})): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(InUseError, match=f"process {holder.pid} on "), lock_file(path):
        raise AssertionError("two at once")
    holder.kill()
    holder.communicate()
    deadline = time.monotonic() + 10
    while True:
        try:
            with lock_file(path):
                assert path.read_text().startswith(f"process {os.getpid()} on ")
            return
        except InUseError:
            assert time.monotonic() < deadline
