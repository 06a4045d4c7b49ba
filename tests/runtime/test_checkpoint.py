import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from moescale.errors import CheckpointError, ConfigError
from moescale.runtime import checkpoint as checkpoints
from moescale.runtime import checkpoint_writer
from moescale.runtime.checkpoint import Checkpoint, CheckpointStore, CheckpointWeights, load, read_state, verify
from moescale.runtime.checkpoint_writer import CheckpointWriter
from moescale.runtime.device import available_cgroup_bytes


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
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda path: removed.append(path))  # killed as it begins
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


@pytest.mark.parametrize("in_background", [True, False])
def test_a_slow_disk_is_progress_as_long_as_it_advances_and_a_dead_one_is_none(tmp_path, monkeypatch, in_background):
    monkeypatch.setattr(checkpoint_writer, "WAIT_SECONDS", 0.02)
    monkeypatch.setattr(checkpoint_writer, "MAX_FILE_BYTES", 1)  # a tensor to a file
    reports: list[float] = []
    dead_from, dead_until = [], []

    def slow_sync(path):
        time.sleep(0.2)
        if path.name == "tensors-00000-0001.safetensors":
            dead_from.append(time.monotonic() + 0.3)
            time.sleep(0.9)
            dead_until.append(time.monotonic())

    monkeypatch.setattr(checkpoint_writer, "_sync", slow_sync)
    store = CheckpointStore(tmp_path, keep=1)
    writer = CheckpointWriter(store, in_background=in_background, on_progress=lambda: reports.append(time.monotonic()))
    writer.begin(1, {}, tensors())
    assert in_background or writer.is_written
    verify(writer.commit())
    assert sum(report < dead_from[0] for report in reports) >= 2
    assert sum(report > dead_until[0] for report in reports) >= 1
    assert not [report for report in reports if dead_from[0] < report < dead_until[0]]


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
    monkeypatch.setattr(checkpoint_writer, "_sync", lambda path: held.wait(1.0))
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
    path.write_text(json.dumps({"sha256": checkpoints.document_digest(document), "content": document}))
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
