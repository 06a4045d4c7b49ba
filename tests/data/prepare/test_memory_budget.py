"""The stated memory bounds what all processes take together."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moescale.data.prepare.memory_budget import resources_for
from moescale.data.prepare.settings import PrepareSettings
from moescale.errors import ConfigError

PREPARE = """
import sys
from pathlib import Path
from moescale.data.prepare import prepare
from moescale.data.prepare.settings import PrepareSettings
if __name__ == "__main__":
    source, tokenizer, output, gigabytes = sys.argv[1:]
    prepare(
        PrepareSettings(
            source=source,
            tokenizer=tokenizer,
            sequence_length=512,
            output=Path(output),
            num_workers=2,
            memory_gigabytes=float(gigabytes),
        ),
        progress=False,
    )
"""


def make_settings(**changes) -> PrepareSettings:
    return PrepareSettings(**({"source": "s", "tokenizer": "t", "sequence_length": 64, "output": Path("o")} | changes))


def test_memory_goes_to_processes_first_and_then_to_chunks():
    tight = resources_for(make_settings(num_workers=4, memory_gigabytes=0.6), vocabulary_size=1000, source_bytes=None)
    wide = resources_for(make_settings(num_workers=4, memory_gigabytes=4.0), vocabulary_size=1000, source_bytes=None)
    assert (tight.num_workers, tight.memory_limited) == (3, True)
    assert (wide.num_workers, wide.memory_limited) == (4, False)
    assert tight.chunk_bytes < wide.chunk_bytes


def test_a_small_source_does_not_start_processes_unless_asked_to():
    assert resources_for(make_settings(), vocabulary_size=1000, source_bytes=1000).num_workers == 1
    assert resources_for(make_settings(num_workers=2), vocabulary_size=1000, source_bytes=1000).num_workers == 2


def test_the_windows_that_conversations_are_packed_from_count():
    settings = make_settings(num_workers=4, memory_gigabytes=0.7)
    numbers = [
        resources_for(settings, vocabulary_size=1000, source_bytes=None, packed_splits=splits).num_workers
        for splits in (0, 1, 2)
    ]
    assert numbers == [3, 2, 1]
    with pytest.raises(ConfigError, match=r"must be at least 0.2"):
        resources_for(make_settings(memory_gigabytes=0.2), vocabulary_size=1000, source_bytes=None, packed_splits=1)


def test_less_memory_than_one_process_needs_is_refused():
    with pytest.raises(ConfigError, match=r"memory_gigabytes \(0.1\) must be at least 0.\d\d: one process .* 100,000"):
        resources_for(make_settings(memory_gigabytes=0.1), vocabulary_size=100_000, source_bytes=None)


def tree_bytes(session: int) -> int:
    """Sum the proportional set sizes of a session's processes: shared pages count once."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[3]) == session:
                total += int((status.parent / "smaps_rollup").read_text().split("Pss:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            continue
    return total


def write_worst_case(path: Path) -> None:
    """24 MB in which words hardly repeat, half of them in one long document that is beyond the table of words."""
    generator = random.Random(0)
    documents = ["".join(f"{generator.getrandbits(40):x} " for _ in range(1000)) for _ in range(1100)]
    documents.append("".join(documents) + "\U0001f600")
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's accounts of memory")
def test_processes_together_stay_within_the_stated_memory(tmp_path, model_folder):
    write_worst_case(tmp_path / "source.jsonl")
    script = tmp_path / "script.py"
    script.write_text(PREPARE)
    arguments = [sys.executable, script, tmp_path / "source.jsonl", model_folder, tmp_path / "output", 0.55]
    process = subprocess.Popen(list(map(str, arguments)), start_new_session=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_bytes(process.pid))
        time.sleep(0.02)
    assert process.returncode == 0
    assert 0.1e9 < peak < 0.55e9
