"""GEMMs in fp8 on several ranks: as near to fp32 arithmetic as those of one device, whoever holds experts and tokens.

The same rows are rounded to the same numbers on all of them. The gradient of an expert's result is rounded before it is
weighted on one device, and behind an all-to-all after; and a micro-batch's rows share an expert's scale.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from gloo_ranks import GlooRanks
from recorded_runs import Run, assert_as_near_to_fp32, record_run

STEPS = 5
MODEL = dict(expert_intermediate_size=32)
FP8 = dict(
    compute_dtype="bf16",
    optimizer_state_dtype="int8",
    master_weight_format="bf16_remainder",
    gradient_dtype="fp32",
    expert_gemms="fp8",
    dense_gemms="fp8",
    model=MODEL,
)


@cache
def on_one_device(accumulation: int = 1, **fields: Any) -> Run:
    return record_run(STEPS, FP8 | fields | dict(accumulation=accumulation))


@cache
def in_fp32(**fields: Any) -> Run:
    return record_run(1, fields | dict(round_weights=True, model=MODEL))


@pytest.fixture(scope="module")
def two_ranks():
    group = GlooRanks(2)
    yield group
    group.close()


@pytest.mark.parametrize(
    "fields",
    [dict(dp_shard=2), dict(dp_shard=2, ep=2), dict(dp_shard=2, ep=2, recompute=("experts",)), dict(dp_replicate=2)],
    ids=lambda fields: " ".join(f"{name}={value}" for name, value in fields.items()),
)
def test_ranks_are_as_near_to_fp32_as_one_device_in_fp8(two_ranks, fields):
    alone = [on_one_device(accumulation) for accumulation in (1, 2, 4)]
    assert_as_near_to_fp32(two_ranks.run(record_run, STEPS, FP8 | fields), alone, in_fp32())


def test_recomputing_the_experts_changes_no_bit(two_ranks):
    kept, again = (
        two_ranks.run(record_run, STEPS, FP8 | dict(dp_shard=2, ep=2, recompute=recompute))
        for recompute in ("none", ("experts",))
    )
    assert [(run.losses, run.norms) for run in kept] == [(run.losses, run.norms) for run in again]


def test_a_rank_whose_experts_nobody_chose_trains_too(two_ranks):
    """All tokens of a step are equal, so all go to the same expert, which is one rank's."""
    runs = two_ranks.run(record_run, STEPS, FP8 | dict(dp_shard=2, ep=2, one_token=True, model=MODEL | dict(top_k=1)))
    alone = record_run(STEPS, FP8 | dict(one_token=True, model=MODEL | dict(top_k=1)))
    assert runs[0].losses == pytest.approx(alone.losses, rel=5e-3)
