"""The Weights & Biases observer in offline mode, read back from the file that ``wandb sync`` would send."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moescale.errors import ConfigError
from moescale.report.metrics import TrainSummary
from moescale.report.observer import RunContext, step_scalars
from moescale.report.registry import make_observer
from tests.report.test_observers import metrics

BLOCK_BYTES = 2**15


def test_without_the_package_a_run_is_refused_before_it_starts(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'wandb'\) needs the package wandb.*pip install 'moescale\[wandb\]'"):
        make_observer("wandb")


def records(path: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file: LevelDB's log format, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    position, parts = 7, b""
    while position + 7 <= len(data):
        if BLOCK_BYTES - position % BLOCK_BYTES < 7:
            position += BLOCK_BYTES - position % BLOCK_BYTES
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history(path: Path) -> dict[int, dict[str, float]]:
    """The scalars of every step in a ``.wandb`` file."""
    steps: dict[int, dict[str, float]] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            steps[int(values["_step"])] = {key: value for key, value in values.items() if not key.startswith("_")}
    return steps


@pytest.mark.slow
def test_an_offline_run_has_tensorboards_scalars_and_resumes_as_the_same_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install 'moescale[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for is_resumed, steps in ((False, (1, 2)), (True, (2, 3))):
        run = RunContext(
            folder=tmp_path,
            total_steps=3,
            flops_per_token=1e6,
            peak_flops=None,
            is_resumed=is_resumed,
            document={"settings": {"seed": 7}},
        )
        observer = make_observer("wandb")
        observer.on_start(run)
        for step in steps:
            observer.on_step(metrics(step))
        observer.on_validation(steps[-1], 2.5)
        if is_resumed:
            observer.on_finish(summary())
        observer.close()
    wandb.teardown()  # as at the end of a process: its service has written everything

    first, second = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    identifier = (tmp_path / "wandb" / "run-id").read_text().strip()
    assert [path.name for path in (first, second)] == [f"run-{identifier}.wandb"] * 2

    expected = step_scalars(metrics(1), run)
    assert expected["train/loss"] == 3.0 and expected["experts/max_load_layer_1"] == 1.1
    assert history(first)[1] == expected
    assert history(first)[2] == step_scalars(metrics(2), run) | VALIDATION
    assert sorted(history(second)) == [2, 3]

    written = list(records(second))
    config = {
        update.key: json.loads(update.value_json)
        for record in written
        if record.WhichOneof("record_type") == "run"
        for update in record.run.config.update
    }
    assert config["settings"] == {"seed": 7}
    assert [record.exit.exit_code for record in written if record.WhichOneof("record_type") == "exit"] == [0]
    assert [record.exit.exit_code for record in records(first) if record.WhichOneof("record_type") == "exit"] == [1]


VALIDATION = {"validation/loss": 2.5, "validation/perplexity": pytest.approx(12.1825, rel=1e-4)}


def summary() -> TrainSummary:
    return TrainSummary(
        steps=3,
        tokens=192,
        seconds=1.0,
        final_loss=3.0,
        validation_loss=2.5,
        skipped_steps=0,
        resumed_from_step=1,
        checkpoint=None,
    )
