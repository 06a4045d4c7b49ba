import json
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from moescale import files
from moescale.errors import CheckpointError, ConfigError
from moescale.files import document_digest
from moescale.runtime import checkpoint_store, checkpoint_writer
from moescale.runtime.checkpoint import Checkpoint, find_missing_elements, load, read_state, verify
from moescale.runtime.checkpoint_store import CheckpointStore
from moescale.runtime.checkpoint_weights import CheckpointWeights
from moescale.runtime.checkpoint_writer import CheckpointWriter
from moescale.runtime.device import available_cgroup_bytes
from moescale.runtime.layout import Part
from moescale.runtime.ranks import Ranks


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("weights.a", "weights.b", "first_moment.a")
    return {name: torch.randn(4, 3, generator=generator) for name in names}


def empty_like(source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in source.items()}


def test_what_was_saved_comes_back_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "MAX_FILE_BYTES", 100)  # two tensors to a file
    saved = tensors()
    checkpoint = CheckpointWriter(CheckpointStore(tmp_path, keep=2)).save(7, {"position": [1, 2]}, saved)
    assert len(list(checkpoint.path.glob("*.safetensors"))) == 2
    loaded = empty_like(saved)
    assert load(checkpoint, loaded) == {"position": [1, 2]} == read_state(checkpoint)
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_only_the_newest_are_kept_and_the_last_is_the_highest_step(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 10):
        CheckpointWriter(store).save(step, {}, tensors())
    assert [checkpoint.step for checkpoint in store.list()] == [2, 10]
    assert store.last().step == 10
    assert store.at(2).step == 2
    with pytest.raises(CheckpointError, match="no checkpoint of step 1; there are: 2, 10"):
        store.at(1)


def test_what_was_just_written_is_kept_though_checkpoints_of_later_steps_are_there(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    for step in (8, 9):
        (tmp_path / f"step-{step:08d}").mkdir(parents=True)
    for step in (1, 2):
        CheckpointWriter(store).save(step, {}, tensors())
        verify(store.at(step))
    assert [checkpoint.step for checkpoint in store.list()] == [2, 8, 9]


def test_later_checkpoints_are_set_aside_with_all_they_hold_and_never_over_one_another(tmp_path):
    store = CheckpointStore(tmp_path, keep=5)
    for step in (1, 2, 3):
        CheckpointWriter(store).save(step, {"step": step}, tensors())
    assert store.set_aside_after(2) == [tmp_path / "aside-step-00000003"]
    CheckpointWriter(store).save(3, {"step": "again"}, tensors())
    assert store.set_aside_after(1) == [tmp_path / "aside-step-00000002", tmp_path / "aside-step-00000003-2"]
    assert [checkpoint.step for checkpoint in store.list()] == [1]
    assert read_state(Checkpoint(path=tmp_path / "aside-step-00000003", step=3)) == {"step": 3}
    assert store.set_aside_after(1) == []


def test_a_checkpoint_that_is_being_dropped_is_none_any_more(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep=1)
    CheckpointWriter(store).save(1, {}, tensors())
    removed = []
    monkeypatch.setattr(checkpoint_store.shutil, "rmtree", lambda path: removed.append(path))  # killed as it begins
    CheckpointWriter(store).save(2, {}, tensors())
    assert [checkpoint.step for checkpoint in store.list()] == [2]
    monkeypatch.undo()
    CheckpointWriter(store).save(3, {}, tensors())
    assert not removed[0].exists()


def test_leftovers_of_an_interrupted_write_do_not_count_and_are_cleared(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    (tmp_path / ".writing-step-00000003").mkdir(parents=True)
    (tmp_path / ".writing-step-00000003" / "state.json").write_text("{}")
    assert store.last() is None
    CheckpointWriter(store).save(5, {}, tensors())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(("free", "total", "fits"), [(143, 1000, False), (144, 1000, True), (0, 0, True)])
def test_a_disk_that_cannot_take_one_checkpoint_is_known_before(tmp_path, monkeypatch, free, total, fits):
    usage = SimpleNamespace(total=total, used=total - free, free=free)
    monkeypatch.setattr(checkpoint_writer.shutil, "disk_usage", lambda path: usage)
    (tmp_path / "checkpoints" / ".writing-step-00000003").mkdir(parents=True)
    writer = CheckpointWriter(CheckpointStore(tmp_path / "checkpoints", keep=1))
    if fits:
        writer.check_room(tensors())  # three tensors of 48 bytes
    else:
        with pytest.raises(ConfigError, match=r"a checkpoint has 144 bytes, the disk 143 left; free space"):
            writer.check_room(tensors())
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_file_in_the_place_of_the_checkpoints_is_known_before(tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(ConfigError, match=r"checkpoints: must be a folder that can be written to \(.*; allow it"):
        CheckpointWriter(CheckpointStore(tmp_path / "checkpoints", keep=1)).check_room(tensors())


class Asking(Ranks):
    """One rank that counts how often the waiting ranks have asked each other whether the writing goes on."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "questions", [])

    def sum_on_host(self, numbers):
        if len(numbers) == 2:  # how many still write, how many have got further
            self.questions.append(numbers[1])
        return list(numbers)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.mark.parametrize("in_background", [True, False])
def test_a_slow_disk_is_progress_as_long_as_it_advances_and_a_dead_one_is_none(tmp_path, monkeypatch, in_background):
    monkeypatch.setattr(checkpoint_writer, "WAIT_SECONDS", 0.02)
    monkeypatch.setattr(checkpoint_writer, "MAX_FILE_BYTES", 1)  # a tensor to a file
    ranks = Asking()
    reports: list[int] = []
    tried: list[str] = []

    def slow_sync(path):
        before = len(reports)
        if path.name == "tensors-00000-0000.safetensors":
            wait_until(lambda: len(reports) > before)  # its file has grown
            tried.append("slow")
        elif path.name == "tensors-00000-0001.safetensors":
            wait_until(lambda: ranks.questions[-3:] == [False] * 3)
            before = len(reports)
            asked = len(ranks.questions)
            wait_until(lambda: len(ranks.questions) >= asked + 5)
            assert len(reports) == before, "a dead disk was taken for a slow one"
            tried.append("dead")
        elif path.name == "tensors-00000-0002.safetensors":
            wait_until(lambda: len(reports) > before)
            tried.append("slow again")

    monkeypatch.setattr(files, "sync", slow_sync)
    store = CheckpointStore(tmp_path, keep=1)
    writer = CheckpointWriter(store, ranks, in_background=in_background, on_progress=lambda: reports.append(1))
    writer.begin(1, {}, tensors())
    assert in_background or writer.is_written
    verify(writer.commit())
    assert tried == ["slow", "dead", "slow again"]


@pytest.mark.parametrize("damage", ["truncate", "flip a high bit", "flip a low bit", "remove"])
@pytest.mark.parametrize("file_name", ["tensors-00000-0000.safetensors", "state.json"])
def test_every_kind_of_damage_is_named_and_nothing_is_loaded(tmp_path, damage, file_name):
    store = CheckpointStore(tmp_path, keep=3)
    CheckpointWriter(store).save(1, {}, tensors())
    checkpoint = CheckpointWriter(store).save(2, {}, tensors())
    path = checkpoint.path / file_name
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage.startswith("flip"):
        content[len(content) // 2] ^= 0x80 if "high" in damage else 0x01
        path.write_bytes(content)
    else:
        path.unlink()
    target = empty_like(tensors())
    with pytest.raises(CheckpointError, match=file_name):
        load(checkpoint, target)
    assert all(not tensor.any() for tensor in target.values())
    skipped = []
    assert store.last_good(on_skip=skipped.append).step == 1
    assert len(skipped) == 1 and str(path) in skipped[0]


@pytest.mark.parametrize(("local_ranks", "waits"), [(1, False), (4, True)])
def test_copies_of_all_ranks_of_a_host_must_fit_into_its_memory(tmp_path, monkeypatch, local_ranks, waits):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    monkeypatch.setattr(checkpoint_writer, "available_host_bytes", lambda: 400.0)  # three tensors of 48 bytes
    held = threading.Event()
    monkeypatch.setattr(files, "sync", lambda path: held.wait(1.0))
    writer = CheckpointWriter(CheckpointStore(tmp_path, keep=1))
    writer.begin(1, {}, tensors())
    assert writer.is_written == waits
    held.set()
    writer.commit()


def test_a_limit_on_the_cgroup_or_one_around_it_bounds_host_memory(tmp_path):
    own_groups = tmp_path / "own"
    own_groups.write_text("1:name=x:/\n0::/outer/inner\n")
    inner = tmp_path / "root" / "outer" / "inner"
    inner.mkdir(parents=True)
    assert available_cgroup_bytes(tmp_path / "root", own_groups) == float("inf")
    for folder, limit, used in ((inner, "max", 50), (inner.parent, "1000", 700), (tmp_path / "root", "5000", 900)):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 600\ninactive_file 25\n")
    assert available_cgroup_bytes(tmp_path / "root", own_groups) == 325
    (inner / "memory.max").write_text("40\n")
    assert available_cgroup_bytes(tmp_path / "root", own_groups) == 15


def test_loading_reports_every_file_and_every_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "MAX_FILE_BYTES", 1)
    checkpoint = CheckpointWriter(CheckpointStore(tmp_path, keep=1)).save(1, {}, tensors())
    reports = []
    load(checkpoint, empty_like(tensors()), on_progress=lambda: reports.append(1))
    assert len(reports) == 2 * len(tensors())


def test_with_all_checkpoints_damaged_there_is_an_error_that_names_each(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    assert store.last_good() is None
    for step, file_name in ((1, "state.json"), (2, "tensors-00000-0000.safetensors")):
        checkpoint = CheckpointWriter(store).save(step, {}, tensors())
        (checkpoint.path / file_name).unlink()
    rule = (
        r"none of the checkpoints \(2\) is undamaged: .*2/tensors-00000-0000.safetensors: missing; .*1/state.json: miss"
    )
    with pytest.raises(CheckpointError, match=rule):
        store.last_good()


def test_another_models_checkpoint_is_refused_before_anything_is_copied(tmp_path):
    checkpoint = CheckpointWriter(CheckpointStore(tmp_path, keep=1)).save(1, {}, tensors())
    with pytest.raises(CheckpointError, match="lacks tensor 'weights.c'"):
        load(checkpoint, empty_like(tensors()) | {"weights.c": torch.zeros(1)})
    fewer = empty_like(tensors())
    del fewer["weights.b"]
    with pytest.raises(CheckpointError, match="has an unknown tensor 'weights.b'"):
        load(checkpoint, fewer)
    other_shape = empty_like(tensors()) | {"weights.a": torch.zeros(3, 4)}
    with pytest.raises(CheckpointError, match=r"'weights.a' has shape \(4, 3\), the model wants \(3, 4\)"):
        load(checkpoint, other_shape)
    assert all(not tensor.any() for tensor in other_shape.values())


def test_a_newer_format_is_refused(tmp_path):
    checkpoint = CheckpointWriter(CheckpointStore(tmp_path, keep=1)).save(1, {}, tensors())
    path = checkpoint.path / "state.json"
    document = json.loads(path.read_text())["content"] | {"format": 99}
    path.write_text(json.dumps({"sha256": document_digest(document), "content": document}))
    with pytest.raises(CheckpointError, match=r"format \(99\) must be 2"):
        read_state(checkpoint)


def test_weights_are_read_by_slice(tmp_path):
    saved = tensors()
    checkpoint = CheckpointWriter(CheckpointStore(tmp_path, keep=1)).save(1, {}, saved)
    with CheckpointWeights(checkpoint) as weights:
        assert sorted(weights.names()) == ["a", "b"]
        assert weights.shape("a") == (4, 3)
        assert torch.equal(weights.read("a"), saved["weights.a"])
        assert torch.equal(weights.read("b", 2), saved["weights.b"][2])


IN_THE_THREAD = ("save_file", "written_by_library", "_check_written", "file_digest", "_by_size")
AT_THE_COMMIT = ("find_missing_elements", "document_digest", "write_atomically")
FAILURES = (OSError(28, "No space left on device"), RuntimeError("can't allocate memory"), KeyError("a"), SystemExit(0))


@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize("failure", [*FAILURES, KeyboardInterrupt()], ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("place", IN_THE_THREAD)
def test_whatever_fails_in_the_thread_is_told_and_the_older_checkpoint_stays(
    tmp_path, monkeypatch, place, failure, in_background
):
    store = CheckpointStore(tmp_path, keep=1)
    older = CheckpointWriter(store).save(1, {}, tensors())

    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(checkpoint_writer, place, fail)
    with pytest.raises(
        CheckpointError, match=r"step-00000002: could not be written \(rank 0: .*the same command resum"
    ):
        CheckpointWriter(store, in_background=in_background).save(2, {}, tensors())
    assert [path.name for path in tmp_path.iterdir()] == [older.path.name]
    verify(older)


@pytest.mark.parametrize("failure", FAILURES[:3], ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("place", AT_THE_COMMIT)
def test_whatever_fails_at_the_commit_is_told_and_the_older_checkpoint_stays(tmp_path, monkeypatch, place, failure):
    store = CheckpointStore(tmp_path, keep=1)
    older = CheckpointWriter(store).save(1, {}, tensors())

    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(checkpoint_writer, place, fail)
    with pytest.raises(CheckpointError, match=r"step-00000002: could not be written"):
        CheckpointWriter(store).save(2, {}, tensors())
    assert [path.name for path in tmp_path.iterdir()] == [older.path.name]
    verify(older)


def _write_nothing(*_, **__) -> None: ...


def _write_fewer(save, group, path):
    save(dict(list(group.items())[:-1]), path)


def _write_other_values(save, group, path):
    save({name: tensor + 1 for name, tensor in group.items()}, path)


def _write_another_dtype(save, group, path):
    save({name: tensor.to(torch.bfloat16) for name, tensor in group.items()}, path)


@pytest.mark.parametrize("wrong", [_write_nothing, _write_fewer, _write_other_values, _write_another_dtype])
def test_files_that_do_not_hold_what_was_to_be_written_are_no_checkpoint(tmp_path, monkeypatch, wrong):
    store = CheckpointStore(tmp_path, keep=1)
    older = CheckpointWriter(store).save(1, {}, tensors())
    save = checkpoint_writer.save_file
    monkeypatch.setattr(checkpoint_writer, "save_file", lambda group, path: wrong(save, group, path))
    with pytest.raises(CheckpointError, match="could not be written"):
        CheckpointWriter(store).save(2, {}, tensors())
    assert [path.name for path in tmp_path.iterdir()] == [older.path.name]


def test_numbers_that_differ_from_themselves_are_written_and_read_back_all_the_same(tmp_path):
    saved = {"weights.a": torch.full((2,), float("nan")), "weights.b": torch.tensor(-0.0)}
    checkpoint = CheckpointWriter(CheckpointStore(tmp_path, keep=1)).save(1, {}, saved)
    loaded = empty_like(saved)
    load(checkpoint, loaded)
    assert loaded["weights.a"].isnan().all() and torch.signbit(loaded["weights.b"])


def test_parts_that_no_rank_has_written_are_missed(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    older = CheckpointWriter(store).save(1, {}, {"weights.a": torch.zeros(4, 3)})
    half = Part(shape=(4, 3), index=(slice(0, 2), slice(0, 3)), is_first_copy=True)
    with pytest.raises(CheckpointError, match="the files hold 6 of the 12 elements of tensor 'weights.a'"):
        CheckpointWriter(store).save(2, {}, {"weights.a": torch.zeros(2, 3)}, parts={"weights.a": half})
    assert store.list() == [older]


def test_a_system_without_a_thread_left_is_told(tmp_path, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(CheckpointError, match="can't start new thread"):
        CheckpointWriter(CheckpointStore(tmp_path, keep=1)).save(1, {}, tensors())


def test_copies_that_get_no_memory_are_done_without(tmp_path, monkeypatch):
    original = torch.Tensor.to

    def refuse(tensor, *arguments, **options):
        if options.get("copy"):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return original(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", refuse)
    writer = CheckpointWriter(CheckpointStore(tmp_path, keep=1))
    writer.begin(1, {}, tensors())
    assert writer.is_written
    verify(writer.commit())


@pytest.mark.parametrize(
    ("shape", "boxes", "whole"),
    [
        ((), [[]], True),
        ((), [], False),
        ((4,), [[[0, 4]]], True),
        ((4,), [[[0, 2]], [[2, 4]]], True),
        ((4,), [[[0, 2]], [[3, 4]]], False),
        ((4,), [[[0, 2]], [[0, 2]]], False),
        ((4,), [[[0, 3]], [[1, 2]]], False),
        ((4,), [[[0, 5]]], False),
        ((4,), [[[-1, 4]]], False),
        ((4,), [[[0, 4], [0, 1]]], False),
        ((2, 4), [[[0, 1], [0, 4]], [[1, 2], [0, 2]], [[1, 2], [2, 4]]], True),
        ((2, 4), [[[0, 1], [0, 4]], [[0, 2], [0, 2]], [[1, 2], [2, 4]]], False),
        ((0, 4), [], True),
    ],
)
def test_boxes_hold_a_tensor_whole_when_each_element_is_in_one(shape, boxes, whole):
    written = {f"file {number}": {"boxes": {"weights.a": box}} for number, box in enumerate(boxes)}
    assert (find_missing_elements({"weights.a": shape}, written) is None) == whole


def _rewrite_state(checkpoint, change) -> None:
    path = checkpoint.path / "state.json"
    document = json.loads(path.read_text())["content"]
    change(document)
    path.write_text(json.dumps({"sha256": document_digest(document), "content": document}))


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["files"].clear(),
        lambda document: document["tensors"].update({"weights.c": [2]}),
        lambda document: document["tensors"].update({"weights.a": [5, 3]}),
        lambda document: document["files"]["tensors-00000-0000.safetensors"]["boxes"].pop("weights.a"),
        lambda document: document["files"]["tensors-00000-0000.safetensors"].pop("boxes"),
        lambda document: document.update({"files": 3}),
    ],
)
def test_a_checkpoint_without_every_element_is_not_the_last_good_one(tmp_path, change):
    """As an earlier version could leave it: the state intact, files that were never written."""
    store = CheckpointStore(tmp_path, keep=3)
    CheckpointWriter(store).save(1, {}, tensors())
    _rewrite_state(CheckpointWriter(store).save(2, {}, tensors()), change)
    skipped = []
    last = store.last_good(on_skip=skipped.append)
    assert last is not None and last.step == 1 and len(skipped) == 1 and "state.json" in skipped[0]


def test_what_a_killed_run_left_goes_at_the_next_start(tmp_path):
    store = CheckpointStore(tmp_path, keep=9)
    for step in (1, 2, 3, 4):
        CheckpointWriter(store).save(step, {}, tensors())
    (tmp_path / ".writing-dropped-step-00000000").mkdir()
    CheckpointWriter(CheckpointStore(tmp_path, keep=2)).tidy(3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{step}" for step in (2, 3, 4)]


def test_old_checkpoints_that_cannot_be_dropped_are_a_notice_and_the_new_one_is_there(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep=1)
    CheckpointWriter(store).save(1, {}, tensors())

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint_store.shutil, "rmtree", refuse)
    notices: list[str] = []
    checkpoint = CheckpointWriter(store, on_notice=notices.append).save(2, {}, tensors())
    verify(checkpoint)
    assert len(notices) == 1 and "older checkpoints could not be removed ([Errno 13] Permission denied" in notices[0]
