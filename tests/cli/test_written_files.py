"""Every file and folder that the package writes has the mode of the umask and is as durable as this table says."""

from __future__ import annotations

import json
import os
import stat
from fnmatch import fnmatch
from pathlib import Path

import pytest

from moescale import cli

DURABLE, LOG = "synced", "not synced: a power failure may take its last lines"
TABLE = {
    "corpus": DURABLE,
    "corpus/*": DURABLE,
    "run": DURABLE,
    "run/run.json": DURABLE,
    "run/summary.json": DURABLE,
    "run/machine.json": DURABLE,
    "run/run.lock": LOG,
    "run/metrics.jsonl": LOG,
    "run/expert_load.jsonl": LOG,
    "run/warnings.jsonl": LOG,
    "run/tensorboard": LOG,
    "run/tensorboard/*": LOG,
    "run/checkpoints": DURABLE,
    "run/checkpoints/step-*": DURABLE,
    "run/checkpoints/step-*/state.json": DURABLE,
    "run/checkpoints/step-*/tensors-*.safetensors": DURABLE,
    "export": DURABLE,
    "export/config.json": DURABLE,
    "export/tokenizer.json": DURABLE,
    "export/tokenizer_config.json": DURABLE,
    "export/generation_config.json": DURABLE,
    "export/model-*.safetensors": DURABLE,
    "export/model.safetensors.index.json": DURABLE,
    "plan.json": DURABLE,
}


def durability(name: str) -> str:
    # fnmatch's star matches slashes too: the pattern with the most parts in common decides.
    matching = [pattern for pattern in TABLE if fnmatch(name, pattern) and pattern.count("/") == name.count("/")]
    assert matching, f"{name} is written and not in the table"
    return TABLE[matching[0]]


@pytest.mark.parametrize("umask", [0o022, 0o007], ids=oct)
def test_modes_and_syncs_of_all_that_prepare_compile_run_and_export_write(tmp_path, monkeypatch, model_folder, umask):
    synced: dict[tuple[int, int], float] = {}
    fsync = os.fsync

    def record(descriptor: int) -> None:
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced[status.st_dev, status.st_ino] = max(status.st_mtime_ns, status.st_ctime_ns)

    def moescale(*arguments: object) -> None:
        with pytest.raises(SystemExit) as caught:
            cli.main(list(map(str, arguments)))
        assert not caught.value.code

    def check(folder: str) -> None:
        for path in [tmp_path / folder, *(tmp_path / folder).rglob("*")]:
            name, status = str(path.relative_to(tmp_path)), path.stat()
            expected = (0o777 if path.is_dir() else 0o666) & ~umask
            assert stat.S_IMODE(status.st_mode) == expected, f"{name}: {oct(status.st_mode)}"
            if durability(name) == DURABLE:
                identity = status.st_dev, status.st_ino
                assert identity in synced, f"{name} was never synced"
                if not path.is_dir():
                    assert status.st_mtime_ns <= synced[identity], f"{name} was written after its sync"

    work, lines = tmp_path, tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": f"document {number} " * 20}) + "\n" for number in range(50)))
    monkeypatch.setattr(os, "fsync", record)
    before = os.umask(umask)
    try:
        source = ("--source", lines, "--tokenizer", model_folder, "--sequence-length", 16)
        moescale("prepare", *source, "--num-workers", 1, "--output", work / "corpus")
        inputs = ("--model", model_folder, "--data", work / "corpus", "--output", work / "run", "--device", "cpu")
        moescale("run", *inputs, "--steps", 2, "--checkpoint-every", 1)
        moescale("run", *inputs, "--steps", 3)
        exported = ("--run", work / "run", "--output", work / "export", "--max-shard-gigabytes", 0.0001)
        moescale("export", *exported, "--dtype", "bf16")
        cluster = ("--model", model_folder, "--cluster", "h200", "--runtime-gpus", 1, "--sequence-length", 16)
        moescale("compile", *cluster, "--tokens-per-step", 64, "--output", work / "plan.json")
        for written in ("corpus", "run", "export", "plan.json"):
            check(written)
        parent = tmp_path.stat()
        assert (parent.st_dev, parent.st_ino) in synced, "the folder that holds the names was never synced"
    finally:
        os.umask(before)


def test_what_is_not_in_the_table_is_noticed():
    with pytest.raises(AssertionError, match="run/new.txt is written and not in the table"):
        durability("run/new.txt")
    assert durability(str(Path("run") / "tensorboard" / "events")) == LOG
