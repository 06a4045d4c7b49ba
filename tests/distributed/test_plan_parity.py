"""Any plan trains as one device does: every gradient of the first step, and the losses of 20 steps.

The ordinary tests compare 5 steps of nearly every mesh, with one or both ways of sharding; the slow ones all 20 of all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from gloo_ranks import GlooRanks
from moescale.models.transformer import build_on_meta
from moescale.runtime.mapping import apply_plan
from plans import make_plan
from recorded_runs import Run, assert_same_run, record_run
from tiny import tiny_config

FEW_STEPS, STEPS = 5, 20

MESHES: dict[int, list[dict[str, Any]]] = {
    2: [dict(dp_shard=2), dict(dp_replicate=2), dict(dp_shard=2, ep=2)],
    4: [
        dict(dp_shard=4),
        dict(dp_replicate=2, dp_shard=2),
        dict(dp_shard=4, ep=4),
        dict(dp_shard=4, ep=2),
        dict(dp_replicate=2, dp_shard=2, ep=2),
    ],
    8: [dict(dp_shard=8, ep=4), dict(dp_replicate=2, dp_shard=4, ep=2)],
}
RECOMPUTES: list[dict[str, Any]] = [
    dict(recompute=recompute, reshard=reshard, dense_sharding=sharding, dp_shard=2, **mesh)
    for recompute in ("block", ("experts",))
    for sharding, reshard in (("fsdp", True), ("fsdp", False), ("zero1", False))
    for mesh in ({}, {"ep": 2})
]


@cache
def on_one_device(steps: int, **fields: Any) -> Run:
    return record_run(steps, fields)


def name(fields: dict[str, Any]) -> str:
    """What a case is called."""
    return " ".join(f"{key}={value}" for key, value in fields.items())


@pytest.fixture(scope="module")
def ranks(request):
    """As many ranks as the case asks for; cases of one number follow each other and share them."""
    group = GlooRanks(request.param)
    yield group
    group.close()


@pytest.fixture(scope="module")
def two_ranks():
    group = GlooRanks(2)
    yield group
    group.close()


ORDINARY_SHARDINGS = {
    "dp_shard=2": ("zero1", "fsdp"),
    "dp_replicate=2": ("zero1", "fsdp"),
    "dp_shard=2 ep=2": ("zero1", "fsdp"),
    "dp_shard=4": ("zero1",),
    "dp_replicate=2 dp_shard=2": ("fsdp",),
    "dp_shard=4 ep=4": ("zero1",),
    "dp_shard=4 ep=2": ("zero1", "fsdp"),
    "dp_replicate=2 dp_shard=2 ep=2": ("fsdp",),
    "dp_shard=8 ep=4": ("zero1",),
    "dp_replicate=2 dp_shard=4 ep=2": (),
}


def cases() -> Iterator[Any]:
    """Cases of one number of ranks follow each other."""
    for size, meshes in MESHES.items():
        for mesh in meshes:
            for sharding in ("zero1", "fsdp"):
                called = f"{sharding}-{name(mesh)}"
                if sharding in ORDINARY_SHARDINGS[name(mesh)]:
                    yield pytest.param(size, mesh, sharding, FEW_STEPS, id=called)
                yield pytest.param(size, mesh, sharding, STEPS, id=f"{called}-{STEPS} steps", marks=pytest.mark.slow)


@pytest.mark.parametrize(("ranks", "mesh", "dense_sharding", "steps"), cases(), indirect=["ranks"], scope="module")
def test_every_mesh_trains_as_one_device_does(ranks, mesh, dense_sharding, steps):
    fields = mesh | dict(dense_sharding=dense_sharding)
    assert_same_run(ranks.run(record_run, steps, fields), on_one_device(steps))


@pytest.mark.parametrize(
    "fields",
    [
        # Where nothing is freed, the ordinary tests have blocks on whole experts, and experts on divided ones.
        pytest.param(
            fields,
            id=name(fields),
            marks=pytest.mark.slow
            if not fields["reshard"] and ("ep" in fields) != (fields["recompute"] == ("experts",))
            else (),
        )
        for fields in RECOMPUTES
    ],
)
def test_every_recompute_mode_and_resharding_trains_as_one_device_does(two_ranks, fields):
    assert_same_run(two_ranks.run(record_run, 5, fields), on_one_device(5))


@pytest.mark.parametrize("recompute", ["block", ("experts",)], ids=str)
def test_recomputing_on_one_device_changes_nothing(recompute):
    alone, again = on_one_device(5), record_run(5, dict(recompute=recompute))
    assert again.losses == alone.losses and again.norms == alone.norms


def test_recomputing_in_the_first_layers_only_changes_nothing_and_is_done_there():
    alone = on_one_device(5)
    for recompute in ("block", ("experts",)):
        again = record_run(5, dict(recompute=recompute, recompute_layers=1))
        assert again.losses == alone.losses and again.norms == alone.norms
    config = tiny_config()  # one dense layer, two MoE layers
    for recompute, expected in (("block", {1}), (("experts",), set())):
        model = build_on_meta(config, torch.float32)
        plan = make_plan(config, recompute=recompute, recompute_layers=1)
        plan = dataclasses.replace(plan, layers=plan.layers[1:])  # dense layers recompute nothing
        apply_plan(model, plan)
        assert model.recompute_layers == expected
        again = [block.feed_forward.experts.recompute_up for block in list(model.layers)[1:]]
        assert again == ([False, False] if recompute == "block" else [True, False])


@pytest.mark.parametrize(
    ("mesh", "dense_sharding"),
    [
        pytest.param(mesh, sharding, id=f"{sharding}-{name(mesh)}", marks=pytest.mark.slow if is_slow else ())
        for mesh in MESHES[2]
        for sharding, is_slow in (("zero1", False), ("fsdp", "ep" not in mesh))
    ],
)
def test_accumulated_micro_batches_train_as_one(two_ranks, mesh, dense_sharding):
    runs = two_ranks.run(record_run, 5, dict(accumulation=4, dense_sharding=dense_sharding, **mesh))
    assert_same_run(runs, on_one_device(5))


# Sequences 4 to 7 are the second rank's, 0 and 1 a micro-batch.
@pytest.mark.parametrize("without", [(4, 5, 6, 7), (0, 1)], ids=["a rank", "a micro-batch"])
@pytest.mark.parametrize("mesh", [dict(dp_shard=2), dict(dp_shard=2, ep=2)], ids=name)
def test_a_rank_or_a_micro_batch_without_targets_trains_as_one_big_batch_does(two_ranks, mesh, without):
    fields = dict(without_targets=without)
    alone = on_one_device(3, **fields)
    assert_same_run([record_run(3, fields | dict(accumulation=4))], alone)
    assert_same_run(two_ranks.run(record_run, 3, fields | mesh | dict(accumulation=2)), alone)


@pytest.mark.parametrize("mesh", [dict(dp_shard=2, ep=2), dict(dp_shard=2)], ids=name)
def test_ranks_whose_experts_nobody_chose_still_train_as_one_device_does(two_ranks, mesh):
    """All tokens of a step are equal, so all go to the same two experts, which for K = 1 is one rank's."""
    fields = dict(one_token=True, model=dict(top_k=1))
    assert_same_run(two_ranks.run(record_run, 5, fields | mesh), record_run(5, fields))


@pytest.mark.parametrize("dense_sharding", ["zero1", "fsdp"])
@pytest.mark.parametrize(("experts", "width"), [(6, 24), (7, 24), (7, 25)])
def test_experts_that_do_not_divide_by_the_ranks_train_as_one_device_does(two_ranks, experts, width, dense_sharding):
    """FSDP2 shards 7 experts on 2 ranks by rows, or, with an odd width, unevenly, as ZeRO-1 always does."""
    fields = dict(model=dict(num_experts=experts, expert_intermediate_size=width))
    runs = two_ranks.run(record_run, 5, fields | dict(dp_shard=2, dense_sharding=dense_sharding))
    assert_same_run(runs, record_run(5, fields))


FORMATS = [
    dict(optimizer_state_dtype=moments, master_weight_format=master, gradient_dtype=gradient, compute_dtype="bf16")
    for moments, master, gradient in [
        ("fp32", "fp32", "fp32"),
        ("bf16", "bf16_remainder", "fp32"),
        ("int8", "stochastic_bf16", "bf16"),
        ("int8", "bf16_remainder", "fp32"),
    ]
]


@pytest.mark.parametrize(
    ("format", "steps"),
    [
        pytest.param(FORMATS[-1], 8, id="-".join(FORMATS[-1].values())),
        *(
            pytest.param(format, STEPS, id=f"{'-'.join(format.values())}-{STEPS} steps", marks=pytest.mark.slow)
            for format in FORMATS
        ),
    ],
)
def test_every_optimizer_format_trains_within_the_noise_of_bf16(two_ranks, format, steps):
    """The yardstick: what cutting a step into micro-batches changes on one device, in the same format."""
    alone = record_run(steps, format)
    noise = max(
        abs(a - b)
        for accumulation in (2, 4)
        for a, b in zip(alone.losses, record_run(steps, dict(accumulation=accumulation, **format)).losses, strict=True)
    )
    for mesh in (dict(dp_shard=2), dict(dp_shard=2, ep=2), dict(dp_shard=2, ep=2, dense_sharding="fsdp")):
        losses = two_ranks.run(record_run, steps, format | mesh)[0].losses
        difference = max(abs(a - b) for a, b in zip(losses, alone.losses, strict=True))
        assert difference <= 2 * noise, f"{name(mesh)}: {difference:.1e}, noise {noise:.1e}"


def test_offloaded_optimizer_state_changes_nothing(two_ranks):
    mesh = dict(dp_shard=2, ep=2)
    stay, leave = (two_ranks.run(record_run, 5, dict(offload_optimizer=offload, **mesh)) for offload in (False, True))
    assert [run.losses for run in stay] == [run.losses for run in leave]
