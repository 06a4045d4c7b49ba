"""What a result says of itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from moescale.tools.measurement import command_of, describe_measurement, write_result

OUTSIDE = "/somewhere/else/corpus"


@pytest.mark.parametrize(
    ("arguments", "environment", "command"),
    [
        (["benchmarks/step.py", "--steps", "3"], {}, "python benchmarks/step.py --steps 3"),
        (["benchmarks/step.py", "--data", OUTSIDE], {}, "python benchmarks/step.py --data corpus"),
        (["benchmarks/step.py", f"--data={OUTSIDE}"], {}, "python benchmarks/step.py --data=corpus"),
        (["benchmarks/step.py", "--pin", "a b"], {}, "python benchmarks/step.py --pin 'a b'"),
        (["ranks.py"], {"RANK": "0", "WORLD_SIZE": "2"}, "torchrun --nproc-per-node 2 ranks.py"),
        (["/bin/moescale", "bench", "experts"], {}, "moescale bench experts"),
        (["/lib/moescale/__main__.py", "bench"], {}, "moescale bench"),
    ],
)
def test_the_command_is_what_one_would_type_without_paths_of_the_machine(arguments, environment, command):
    assert command_of(arguments, environment) == command


def test_a_path_in_the_repository_is_relative_to_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = command_of([str(tmp_path / "benchmarks" / "step.py"), "--output", str(tmp_path / "a.json")], {})
    assert command == "python benchmarks/step.py --output a.json"


def test_a_measurement_names_commit_date_and_versions(tmp_path: Path):
    found = describe_measurement("numpy", "no-such-package")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["date"])
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["no-such-package"] == "not installed"
    assert re.fullmatch(r"\d+(\.\d+)+", found["versions"]["numpy"])
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{7,40}(\+changes)?", found["commit"])
    write_result(tmp_path / "results" / "a.json", found)
    assert json.loads((tmp_path / "results" / "a.json").read_text()) == found
