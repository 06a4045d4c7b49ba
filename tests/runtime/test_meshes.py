"""Plans that this runtime, or this number of processes, cannot run are refused before any work."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from moescale.errors import ConfigError
from moescale.models.transformer import build_on_meta
from moescale.plan import MeshShape, ParallelPlan, one_device_plan
from moescale.runtime.mapping import apply_plan
from moescale.runtime.meshes import build_meshes, check_runnable
from moescale.runtime.ranks import ONE_RANK, Ranks
from tiny import tiny_config


def plan_of(**axes: int) -> ParallelPlan:
    plan = one_device_plan(
        tiny_config(),
        sequence_length=16,
        micro_batch_sequences=1,
        gradient_accumulation_steps=1,
        compute_dtype="fp32",
    )
    mesh = MeshShape(**axes)
    unit = mesh.pp * mesh.dp_shard * mesh.cp * mesh.tp
    return dataclasses.replace(
        plan,
        mesh=mesh,
        plan_gpus=unit,
        runtime_gpus=unit * mesh.dp_replicate,
        tokens_per_step=plan.tokens_per_step * mesh.dp_shard * mesh.dp_replicate,
    )


@pytest.mark.parametrize("axis", ["pp", "cp", "tp"])
def test_an_axis_this_version_does_not_run_is_refused_by_name(axis):
    with pytest.raises(ConfigError, match=rf"plan\.mesh\.{axis} \(2\) must be 1: .* compile the plan with {axis} 1"):
        check_runnable(plan_of(**{axis: 2}), Ranks(rank=0, size=2))


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_another_number_of_processes_than_the_plan_wants_is_refused(processes):
    message = f"plan.runtime_gpus (4) must equal the number of processes ({processes}); start it with"
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_meshes(plan_of(dp_replicate=2, dp_shard=2), Ranks(rank=0, size=processes), "cpu")


def test_a_plan_of_one_device_needs_no_mesh():
    assert build_meshes(plan_of(), ONE_RANK, "cpu") is None


def test_a_plan_of_several_ranks_is_not_applied_without_their_meshes():
    config = tiny_config()
    with pytest.raises(ConfigError, match=r"plan\.runtime_gpus \(2\) must be 1 if the model is not sharded"):
        apply_plan(build_on_meta(config, torch.float32), plan_of(dp_shard=2))
