"""Where ranks stand: against numpy's numbering of a grid, and against the meshes that PyTorch builds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from moescale.coordinates import AXES, ONE_DEVICE, Coordinates, data_parallel
from moescale.plan import MeshShape, ParallelPlan, one_device_plan
from moescale.runtime.meshes import build_meshes
from moescale.runtime.ranks import Ranks
from tiny import tiny_config

MESHES = [
    MeshShape(),
    MeshShape(dp_shard=4, ep=2),
    MeshShape(dp_replicate=2, dp_shard=4, ep=4),
    MeshShape(pp=2, dp_replicate=2, dp_shard=2, cp=2, tp=3, ep=4),
    MeshShape(pp=3, dp_shard=4, cp=2, tp=2, ep=2),
]
EVERY_MESH = pytest.mark.parametrize("mesh", MESHES, ids=str)


def grid(mesh: MeshShape) -> tuple[int, ...]:
    return tuple(getattr(mesh, axis) for axis in AXES)


def ranks_of(mesh: MeshShape) -> list[Coordinates]:
    return [Coordinates(mesh=mesh, rank=rank) for rank in range(int(np.prod(grid(mesh))))]


@EVERY_MESH
def test_ranks_are_numbered_in_row_major_order(mesh):
    for place in ranks_of(mesh):
        expected = tuple(int(number) for number in np.unravel_index(place.rank, grid(mesh)))
        assert tuple(place.on(axis) for axis in AXES) == expected


@EVERY_MESH
def test_each_data_rank_has_one_rank_for_every_place_on_the_other_axes(mesh):
    peers = mesh.pp * mesh.cp * mesh.tp
    counted = Counter(place.data_rank for place in ranks_of(mesh))
    assert counted == dict.fromkeys(range(mesh.dp_replicate * mesh.dp_shard), peers)


@EVERY_MESH
def test_batches_tokens_and_stages_are_each_spoken_for_once(mesh):
    places = ranks_of(mesh)
    assert sorted(place.data_rank for place in places if place.counts_batches) == list(range(places[0].num_data_ranks))
    tokens = Counter((place.stage, place.data_rank, place.on("cp")) for place in places if place.counts_tokens)
    assert set(tokens.values()) == {1} and len(tokens) == mesh.pp * places[0].num_data_ranks * mesh.cp
    assert [place.stage for place in places if place.writes_stage] == list(range(mesh.pp))


@EVERY_MESH
def test_every_copy_of_the_experts_is_whole(mesh):
    held = Counter(
        (place.stage, place.on("dp_replicate"), place.on("tp"), place.expert_data_rank, place.expert_rank)
        for place in ranks_of(mesh)
    )
    assert set(held.values()) == {1}
    copies = ranks_of(mesh)[0].num_expert_data_ranks
    assert len(held) == mesh.pp * mesh.dp_replicate * mesh.tp * copies * mesh.ep


def test_one_device_does_everything():
    assert (ONE_DEVICE.data_rank, ONE_DEVICE.num_data_ranks, ONE_DEVICE.stage, ONE_DEVICE.expert_rank) == (0, 1, 0, 0)
    assert ONE_DEVICE.counts_batches and ONE_DEVICE.counts_tokens and ONE_DEVICE.writes_stage


def test_data_parallel_ranks_are_data_ranks():
    assert [data_parallel(3, rank).data_rank for rank in range(3)] == [0, 1, 2]


def test_a_rank_outside_the_mesh_is_a_mistake_of_the_code():
    with pytest.raises(AssertionError, match="rank 4 of 4"):
        Coordinates(mesh=MeshShape(dp_shard=4), rank=4)


def plan_of(mesh: MeshShape) -> ParallelPlan:
    plan = one_device_plan(
        tiny_config(),
        sequence_length=16,
        micro_batch_sequences=1,
        gradient_accumulation_steps=1,
        compute_dtype="fp32",
    )
    ranks = mesh.dp_replicate * mesh.dp_shard
    return replace(
        plan, mesh=mesh, plan_gpus=mesh.dp_shard, runtime_gpus=ranks, tokens_per_step=ranks * plan.tokens_per_step
    )


@pytest.mark.parametrize("rank", range(8))
@pytest.mark.parametrize("mesh", [MESHES[2], MeshShape(dp_replicate=2, dp_shard=4, ep=2)], ids=str)
def test_the_meshes_of_the_runtime_put_a_rank_where_its_coordinates_say(mesh, rank):
    dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
    try:
        meshes = build_meshes(plan_of(mesh), Ranks(rank=rank, size=8), "cpu")
        assert meshes is not None
        place = meshes.coordinates
        assert list(meshes.dense.get_coordinate()) == [place.on("dp_replicate"), place.on("dp_shard")]
        expected = [place.on("dp_replicate"), place.expert_data_rank, place.expert_rank]
        assert list(meshes.experts.get_coordinate()) == expected
    finally:
        dist.destroy_process_group()
