"""Checkpoints are independent of the layout: saved on some ranks, resumed on others, with nothing seen twice."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from gloo_ranks import GlooRanks
from moescale import files
from moescale.data.corpus import PackedSequence
from moescale.data.loader import Loader
from moescale.data.shuffle import permuted
from moescale.errors import CheckpointError
from moescale.runtime.checkpoint_store import CheckpointStore
from moescale.runtime.checkpoint_weights import CheckpointWeights
from plans import SEQUENCE_LENGTH, SEQUENCES_PER_STEP, make_trainer

TOTAL_STEPS = 12


class Stage(NamedTuple):
    """A stretch of a run: to which step, on what."""

    until: int
    ranks: int
    mesh: dict[str, int]


class Outcome(NamedTuple):
    losses: list[float]
    sequences: list[list[int]]
    """This rank's, by step."""
    weights: dict[str, torch.Tensor]
    """This rank's parts of the master weights."""


STAGES = (
    Stage(3, 4, dict(dp_shard=4, ep=2)),
    Stage(5, 2, dict(dp_replicate=2)),
    Stage(7, 1, {}),
    Stage(10, 8, dict(dp_replicate=2, dp_shard=4, ep=4)),
    Stage(TOTAL_STEPS, 4, dict(dp_shard=4)),
)
FORMATS = (
    {},
    dict(
        compute_dtype="bf16",
        optimizer_state_dtype="int8",
        master_weight_format="bf16_remainder",
        gradient_dtype="fp32",
    ),
)


def train(folder: Path, until: int, fields: dict[str, Any], last_good: bool = False) -> Outcome:
    """Continue the run in ``folder`` to a step of a run of TOTAL_STEPS, and save there."""
    one = make_trainer(folder, total_steps=TOTAL_STEPS, **fields)
    checkpoint = one.store.last_good() if last_good else one.store.last()
    if checkpoint is not None:
        one.resume(checkpoint)
    steps = iter(one.source)
    while one.step < until:
        one.observer.on_step(one.train_step(next(steps)))
    one._save()
    one._commit()
    weights = {name: one.optimizer.master(name).clone() for name in one.optimizer.parameters}
    return Outcome(one.observer.losses, one.source.seen, weights)


@pytest.fixture(scope="module")
def groups():
    groups = {size: GlooRanks(size) for size in (2, 4, 8)}
    yield groups
    for group in groups.values():
        group.close()


def run(groups: dict[int, GlooRanks], ranks: int, *args: Any) -> list[Outcome]:
    return [train(*args)] if ranks == 1 else groups[ranks].run(train, *args)


def formats(*, slow: int) -> pytest.MarkDecorator:
    """All formats, number ``slow`` of them among the slow tests: each is an ordinary one of one of two tests."""
    names = ("fp32", "int8 moments and remainder")
    cases = [
        pytest.param(format, id=name, marks=[pytest.mark.slow] if number == slow else [])
        for number, (format, name) in enumerate(zip(FORMATS, names, strict=True))
    ]
    return pytest.mark.parametrize("format", cases)


@formats(slow=1)
def test_a_run_moved_from_4_ranks_to_2_to_1_to_8_and_back_is_the_undisturbed_run(tmp_path, groups, format):
    straight = train(tmp_path / "straight", TOTAL_STEPS, format)
    losses, sequences = [], []
    for stage in STAGES:
        outcomes = run(groups, stage.ranks, tmp_path / "moved", stage.until, format | stage.mesh)
        losses += outcomes[0].losses
        for step in zip(*(outcome.sequences for outcome in outcomes), strict=True):
            sequences.append([number for share in step for number in share])
    # In bf16 another number of ranks rounds other sums.
    tolerance = 1e-5 if not format else 2e-3
    assert losses == pytest.approx(straight.losses, rel=tolerance)
    expected = [[step * SEQUENCES_PER_STEP + k for k in range(SEQUENCES_PER_STEP)] for step in range(TOTAL_STEPS)]
    assert sequences == expected


@formats(slow=0)
def test_what_4_ranks_save_is_read_bit_for_bit_by_any_number_of_ranks(tmp_path, groups, format):
    """No step in between: every rank's parts, joined by the next checkpoint, are the same bits."""
    run(groups, 4, tmp_path, 2, format | dict(dp_shard=4, ep=2))
    before = read_all(tmp_path)
    for ranks, mesh in ((2, dict(dp_shard=2)), (8, dict(dp_shard=8, ep=2)), (1, {}), (4, dict(dp_shard=4, ep=4))):
        run(groups, ranks, tmp_path, 2, format | mesh)
        after = read_all(tmp_path)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), mesh


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    from moescale.runtime.checkpoint import StoredTensors

    with StoredTensors(CheckpointStore(folder, keep=1).last()) as stored:
        return {
            name: stored.read(name, tuple(slice(0, size) for size in shape)) for name, shape in stored.shapes.items()
        }


def test_on_the_same_ranks_a_resumed_run_continues_bit_for_bit(tmp_path, groups):
    fields = dict(dp_shard=2, ep=2)
    straight = run(groups, 2, tmp_path / "straight", 6, fields)
    run(groups, 2, tmp_path / "cut", 3, fields)
    resumed = run(groups, 2, tmp_path / "cut", 6, fields)
    for whole, rest in zip(straight, resumed, strict=True):
        assert whole.losses[3:] == rest.losses
        assert all(torch.equal(whole.weights[name], rest.weights[name]) for name in whole.weights)


def test_a_sharded_checkpoint_is_exported_on_one_process(tmp_path, groups):
    run(groups, 4, tmp_path, 2, dict(dp_shard=4, ep=2))
    alone = train(tmp_path, 2, {})
    with CheckpointWeights(CheckpointStore(tmp_path, keep=1).last()) as weights:
        assert sorted(weights.names()) == sorted(alone.weights)
        for name, weight in alone.weights.items():
            assert torch.equal(weights.read(name), weight)
            assert torch.equal(weights.read(name, 1), weight[1])


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damage_to_any_file_is_named_on_every_rank_and_last_good_steps_back(tmp_path, groups, damage):
    fields = dict(dp_shard=2, ep=2)
    run(groups, 2, tmp_path, 1, fields)
    run(groups, 2, tmp_path, 2, fields)
    folder = CheckpointStore(tmp_path, keep=3).last().path
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        if damage == "remove":
            path.unlink()
        elif damage == "truncate":
            path.write_bytes(content[:-1])
        else:
            path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
        assert groups[2].run(error_of_resume, tmp_path, fields) == [path.name] * 2
        assert CheckpointStore(tmp_path, keep=3).last_good().step == 1
        path.write_bytes(content)
    assert groups[2].run(error_of_resume, tmp_path, fields) == [None, None]


def test_a_run_resumed_from_the_last_good_checkpoint_keeps_what_it_writes(tmp_path, groups):
    """With three kept, and two damaged ones of higher steps in the way."""
    fields = dict(dp_shard=2, ep=2)
    for step in (1, 2, 3):
        run(groups, 2, tmp_path, step, fields)
    for step, file_name in ((2, "tensors-00001-0000.safetensors"), (3, "state.json")):
        (CheckpointStore(tmp_path, keep=3).at(step).path / file_name).unlink()
    summaries = groups[2].run(resume_last_good_and_train, tmp_path, fields)
    store = CheckpointStore(tmp_path, keep=3)
    assert [checkpoint.step for checkpoint in store.list()] == [4, 5, 6]
    assert store.last_good() == store.last()
    for skipped, aside, written in summaries:
        assert [Path(text.split(":")[0]).name for text in skipped] == ["state.json", "tensors-00001-0000.safetensors"]
        assert [path.name for path in aside] == ["aside-step-00000002", "aside-step-00000003"]
        assert all(path.is_dir() for path in aside)
        assert written == str(store.last().path)


def resume_last_good_and_train(folder: Path, fields: dict[str, Any]) -> tuple[list[str], list[Path], str | None]:
    one = make_trainer(folder, total_steps=6, settings=dict(checkpoint_every=1), **fields)
    skipped: list[str] = []
    checkpoint = one.store.last_good(one.ranks, skipped.append)
    assert checkpoint is not None and checkpoint.step == 1
    aside = one.resume(checkpoint)
    return skipped, aside, one.train().checkpoint


class NumberedCorpus:
    """Every token of sequence ``i`` is ``i``, so the model's own input says which sequence it is."""

    num_sequences = vocabulary_size = 20
    sequence_length = SEQUENCE_LENGTH
    name = fingerprint = "numbered"
    document_boundaries = has_padding = False

    def sequence(self, index: int) -> PackedSequence:
        return PackedSequence(np.full(SEQUENCE_LENGTH, index, dtype=np.uint16), None)


def train_on_corpus(folder: Path, until: int, fields: dict[str, int]) -> list[list[tuple[int, list[int]]]]:
    """Train with the loader of the real runs; by step, id and distinct tokens of each sequence of this rank."""
    one = make_trainer(folder, total_steps=TOTAL_STEPS, **fields)
    share = SEQUENCES_PER_STEP // one.coordinates.num_data_ranks
    one.source = Loader(
        NumberedCorpus(),
        sequences_per_step=SEQUENCES_PER_STEP,
        micro_batch_sequences=share,
        seed=7,
        coordinates=one.coordinates,
    )
    checkpoint = one.store.last()
    if checkpoint is not None:
        one.resume(checkpoint)
    seen = []
    steps = iter(one.source)
    while one.step < until:
        batches = next(steps)
        one.train_step(batches)
        rows = [row for batch in batches for row in zip(batch.sequence_ids, batch.tokens, strict=True)]
        seen.append([(int(number), tokens.unique().tolist()) for number, tokens in rows])
    one._save()
    one._commit()
    return seen


def test_the_loader_hands_out_each_sequence_of_the_order_once_over_4_then_2_then_1_ranks(tmp_path, groups):
    """Three epochs of 20 sequences in steps of 8: the moves fall into epochs, and steps across their ends."""
    seen = []
    for ranks, until, mesh in ((4, 2, dict(dp_shard=4, ep=2)), (2, 5, dict(dp_shard=2)), (1, 8, {})):
        shares = (
            [train_on_corpus(tmp_path, until, mesh)]
            if ranks == 1
            else groups[ranks].run(train_on_corpus, tmp_path, until, mesh)
        )
        seen += [[row for share in step for row in share] for step in zip(*shares, strict=True)]
    assert all(tokens == [number] for step in seen for number, tokens in step)
    numbers = [number for step in seen for number, _ in step]
    order = [permuted(np.arange(20), 20, seed=7, epoch=epoch).tolist() for epoch in range(4)]
    assert numbers == sum(order, [])[:64]
    assert all(sorted(numbers[start : start + 20]) == list(range(20)) for start in (0, 20, 40))


def test_a_checkpoint_of_other_optimizer_formats_is_refused_with_both_and_the_way_out(tmp_path):
    def make(**formats: str):
        one = make_trainer(tmp_path, compute_dtype="bf16", **formats)
        one.plan = {"optimizer_state_dtype": "fp32", "master_weight_format": "fp32"} | formats
        return one

    written = dict(optimizer_state_dtype="int8", master_weight_format="bf16_remainder")
    one = make(**written)
    one._save()
    one._commit()
    rule = (
        "was written with optimizer_state_dtype int8 and master_weight_format bf16_remainder, this run's plan says "
        "fp32 and fp32; compile the plan with --pin optimizer_state_dtype=int8 --pin "
        "master_weight_format=bf16_remainder, or choose another --output"
    )
    with pytest.raises(CheckpointError, match=rule):
        make().resume(one.store.last())
    with pytest.raises(CheckpointError, match="with optimizer_state_dtype int8, this run's plan says bf16; "):
        make(**written | dict(optimizer_state_dtype="bf16")).resume(one.store.last())
    make(**written).resume(one.store.last())


def error_of_resume(folder: Path, fields: dict[str, Any]) -> str | None:
    one = make_trainer(folder, **fields)
    try:
        one.resume(one.store.last())
    except CheckpointError as error:
        return str(error).split(":")[0].rpartition("/")[2]
    return None


def test_while_one_ranks_disk_is_slow_every_rank_reports_progress(tmp_path, groups):
    for reports in groups[2].run(reports_while_rank_1_writes_slowly, tmp_path):
        assert reports >= 2


def reports_while_rank_1_writes_slowly(folder: Path) -> int:
    from moescale.runtime import checkpoint_writer

    one = make_trainer(folder, dp_shard=2, ep=2)
    reports: list[str] = []
    one.on_progress = lambda step, phase: reports.append(phase)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_writer, "WAIT_SECONDS", 0.02)
        if one.ranks.rank == 1:
            patch.setattr(checkpoint_writer, "MAX_FILE_BYTES", 2**17)
            patch.setattr(files, "sync", lambda path: time.sleep(0.1))
        one._save()
        reports.clear()
        one._commit()
    return reports.count("writing a checkpoint")


def test_a_rank_that_cannot_write_stops_all_with_one_error_and_older_checkpoints_stay(tmp_path, groups):
    fields = dict(dp_shard=2, ep=2)
    run(groups, 2, tmp_path, 1, fields)
    for error in groups[2].run(error_of_write, tmp_path, fields):
        assert "step-00000002: could not be written (rank 1: No space left" in error
    store = CheckpointStore(tmp_path, keep=3)
    assert [checkpoint.step for checkpoint in store.list()] == [1]
    assert not list(tmp_path.glob(".writing-*"))


def error_of_write(folder: Path, fields: dict[str, Any]) -> str:
    from moescale.runtime import checkpoint_writer

    def full_disk(*_):
        raise OSError("No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if torch.distributed.get_rank() == 1:
            patch.setattr(checkpoint_writer, "save_file", full_disk)
        try:
            train(folder, 2, fields)
        except CheckpointError as error:
            return str(error)
    return "no error"
