"""Training on two ranks gives the losses, norms and weights that a stored run gave, bit for bit on a CPU like its own.

CPUs with other vector instructions, and other versions of torch, sum in another order; there losses and norms are
compared within a tolerance, and weights not at all. Written anew, where arithmetic is meant to change, by

    python tests/distributed/test_stored_run.py COMMIT
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

if __name__ == "__main__":  # pytest sets these paths itself
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from gloo_ranks import GlooRanks
from moescale.runtime.layout import local_tensor
from plans import make_trainer

STORED = Path(__file__).parents[1] / "stored" / "two_ranks.json"
STEPS = 4
RUNS: dict[str, dict[str, Any]] = {
    "whole weights, experts on two ranks, fp32": dict(dp_shard=2, ep=2),
    "sharded weights, blocks recomputed, bf16 with 8-bit moments": dict(
        dp_shard=2,
        dense_sharding="fsdp",
        recompute="block",
        compute_dtype="bf16",
        optimizer_state_dtype="int8",
        master_weight_format="bf16_remainder",
        gradient_dtype="bf16",
    ),
}


class Outcome(NamedTuple):
    losses: list[float]
    norms: list[float]
    weights: str
    """SHA-256 of the bits of this rank's part of every parameter, in the model's order."""


def train(fields: dict[str, Any]) -> Outcome:
    """Train on this rank."""
    trainer = make_trainer(Path("unused"), total_steps=STEPS, settings={"final_checkpoint": False}, **fields)
    trainer.train()
    digest = hashlib.sha256()
    for _, parameter in trainer.model.named_parameters():
        digest.update(local_tensor(parameter).detach().contiguous().view(torch.uint8).numpy().tobytes())
    norms = [metrics.gradient_norm for metrics in trainer.observer.metrics]
    return Outcome(trainer.observer.losses, norms, digest.hexdigest())


def arithmetic() -> dict[str, str]:
    """What decides the bits of a sum besides the program."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    found = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    fields = {name.strip(): value.strip() for name, value in found.items()}
    flags = [flag for flag in fields.get("flags", "").split() if flag.startswith(("amx", "avx", "fma"))]
    return {"vendor": fields.get("vendor_id", ""), "flags": " ".join(sorted(flags)), "torch": torch.__version__}


@pytest.fixture(scope="module")
def ranks():
    started = GlooRanks(2)
    yield started
    started.close()


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_two_ranks_gives_what_the_stored_one_gave(ranks, name):
    stored = json.loads(STORED.read_text())
    outcomes = ranks.run(train, RUNS[name])
    expected = [Outcome(**outcome) for outcome in stored["runs"][name]]
    if arithmetic() == stored["arithmetic"]:
        assert [Outcome(*outcome) for outcome in outcomes] == expected
    tolerance = 1e-2 if "bf16" in name else 1e-5
    for outcome, known in zip(outcomes, expected, strict=True):
        assert outcome.losses == pytest.approx(known.losses, rel=tolerance)
        assert outcome.norms == pytest.approx(known.norms, rel=10 * tolerance)


def write(commit: str) -> None:
    ranks = GlooRanks(2)
    runs = {name: [outcome._asdict() for outcome in ranks.run(train, fields)] for name, fields in RUNS.items()}
    ranks.close()
    command = f"python tests/distributed/test_stored_run.py {commit}"
    document = {"command": command, "commit": commit, "arithmetic": arithmetic(), "runs": runs}
    STORED.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    write(sys.argv[1])
