"""Adapters on several ranks: every layout trains as one device does, and the frozen weights stay as they were."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from gloo_ranks import GlooRanks
from moescale.convert.folder_weights import FolderWeights
from moescale.lora import LoraSettings
from moescale.models.frozen_fp8 import weights_in_fp8
from moescale.models.lora import add_adapters, is_adapter
from moescale.models.transformer import build_on_meta, initialize
from moescale.runtime.frozen import frozen_digest, source_digest
from moescale.runtime.layout import find_parts, local_tensor
from moescale.runtime.meshes import build_meshes
from moescale.runtime.ranks import current_ranks
from moescale.runtime.session import place_model
from plans import make_plan, make_trainer
from recorded_runs import assert_same_run, record_run
from tests.distributed.test_resume import train
from tests.parity.test_parity import export
from tiny import tiny_config

LORA = LoraSettings(rank=4, alpha=8)
BASES = {base: dataclasses.replace(LORA, base=base) for base in ("compute", "fp8")}
SETTINGS = {"learning_rate": 2e-2}
LAYOUTS: list[dict[str, Any]] = [
    dict(dp_shard=2),
    dict(dp_shard=2, ep=2),
    dict(dp_replicate=2),
    dict(dp_shard=2, dense_sharding="fsdp"),
    dict(dp_shard=2, ep=2, dense_sharding="fsdp"),
    dict(dp_shard=2, ep=2, recompute=("experts",)),
    dict(dp_shard=2, dense_sharding="fsdp", recompute="block"),
    dict(dp_shard=2, accumulation=2),
]


@pytest.fixture(scope="module")
def two_ranks():
    group = GlooRanks(2)
    yield group
    group.close()


@pytest.mark.parametrize("base", BASES)
def test_every_layout_trains_adapters_as_one_device_does(two_ranks: GlooRanks, base: str) -> None:
    fields = dict(lora=BASES[base], settings=SETTINGS)
    alone = record_run(3, fields)
    assert alone.gradients.keys() == {name for name in alone.gradients if is_adapter(name)}
    assert alone.losses[-1] != alone.losses[0]
    for layout in LAYOUTS:
        assert_same_run(two_ranks.run(record_run, 3, fields | layout), alone)


def frozen_weights_change(fields: dict[str, Any]) -> tuple[set[str], int]:
    """Names of frozen weights that three steps have changed in any bit, and how many there are."""
    settings = SETTINGS | {"final_checkpoint": False}
    trainer = make_trainer(Path("unused"), total_steps=3, settings=settings, **fields)
    frozen = {name: p for name, p in trainer.model.named_parameters() if not is_adapter(name)}

    def bits() -> dict[str, torch.Tensor]:
        return {name: local_tensor(p).contiguous().view(torch.uint8).clone() for name, p in frozen.items()}

    before = bits()
    trainer.train()
    assert all(parameter.grad is None for parameter in frozen.values())
    return {name for name, after in bits().items() if not torch.equal(after, before[name])}, len(frozen)


@pytest.mark.parametrize(
    ("compute_dtype", "base"),
    [
        ("fp32", "compute"),
        ("bf16", "fp8"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("fp32", "fp8"), ("bf16", "compute"))),
    ],
)
def test_no_bit_of_a_frozen_weight_changes(two_ranks: GlooRanks, compute_dtype: str, base: str) -> None:
    dtype = dict(compute_dtype=compute_dtype, lora=BASES[base])
    for fields in (dict(dp_shard=2, ep=2), dict(dp_shard=2, ep=2, dense_sharding="fsdp")):
        for changed, number in two_ranks.run(frozen_weights_change, fields | dtype):
            assert not changed and number > 30


UNALIGNED = dict(hidden_size=144, dense_intermediate_size=160, expert_intermediate_size=136)
"""Neither these widths nor a rank's rows of them are whole blocks of 128."""


def digest_of(fields: dict[str, Any], flipped: bool, base: str) -> str:
    """Of the frozen weights in a layout; ``flipped``: with the last bit of one weight changed, where it is held."""
    trainer = make_trainer(Path("unused"), lora=BASES[base], model=UNALIGNED, **fields)
    ranks = current_ranks()
    plan = make_plan(tiny_config(**UNALIGNED), lora=BASES[base], **fields)
    parts = find_parts(trainer.model, build_meshes(plan, ranks, "cpu") if ranks.size > 1 else None)
    if flipped:
        name = "layers.2.feed_forward.experts.down"
        held, weight = parts[name].index[0], local_tensor(trainer.model.get_parameter(name))
        if held.start <= 5 < held.stop:
            weight[5 - held.start, 3, 2].view(torch.int8 if base == "fp8" else torch.int32).bitwise_xor_(1)
    return frozen_digest(trainer.model, parts, ranks)


@pytest.mark.parametrize("base", BASES)
def test_the_digest_of_frozen_weights_is_the_same_in_every_layout_and_tells_a_bit(
    two_ranks: GlooRanks, base: str
) -> None:
    alone = {flipped: digest_of({}, flipped, base) for flipped in (False, True)}
    assert alone[True] != alone[False]
    for fields in (dict(dp_shard=2, ep=2), dict(dp_shard=2, dense_sharding="fsdp"), dict(dp_replicate=2)):
        for flipped in (False, True):
            assert set(two_ranks.run(digest_of, fields, flipped, base)) == {alone[flipped]}


def imported_digest(folder: Path, fields: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """Of the frozen weights in fp8 that a rank has read from a folder; and their errors."""
    ranks, config = current_ranks(), tiny_config(**UNALIGNED)
    plan = make_plan(config, lora=BASES["fp8"], **fields)
    placed = place_model(config, plan, ranks, torch.device("cpu"))
    placed.import_weights(folder)
    return frozen_digest(placed.model, placed.parts, ranks), placed.errors_in_fp8(ranks)


def test_every_layout_reads_the_same_weights_in_fp8_from_a_folder(two_ranks: GlooRanks, tmp_path: Path) -> None:
    config = tiny_config(**UNALIGNED)
    bare = build_on_meta(config, torch.float32).to_empty(device="cpu")
    initialize(bare, seed=4)
    folder = export(config, bare, tmp_path)
    digest, errors = imported_digest(folder, {})
    adapted = build_on_meta(config, torch.float32)
    add_adapters(adapted, BASES["fp8"])
    assert digest == source_digest(FolderWeights(folder, config, torch.float32), weights_in_fp8(adapted))
    assert errors.keys() >= {"attention.q_proj", "feed_forward.experts.down"}
    for fields in (dict(dp_shard=2, ep=2), dict(dp_shard=2, dense_sharding="fsdp"), dict(dp_replicate=2)):
        for found, of_rank in two_ranks.run(imported_digest, folder, fields):
            assert found == digest and of_rank == pytest.approx(errors, rel=1e-9)


@pytest.mark.parametrize("base", BASES)
def test_adapters_saved_on_some_ranks_are_resumed_on_others(two_ranks: GlooRanks, tmp_path: Path, base: str) -> None:
    def stages(folder: Path, layouts: list[dict[str, Any]]) -> list[float]:
        losses = []
        for number, layout in enumerate(layouts):
            fields = dict(lora=BASES[base], settings=SETTINGS) | layout
            until = 2 * (number + 1)
            outcome = two_ranks.run(train, folder, until, fields)[0] if layout else train(folder, until, fields)
            losses += outcome.losses
        return losses

    moving = stages(
        tmp_path / "moving", [dict(dp_shard=2, ep=2), {}, dict(dp_shard=2, dense_sharding="fsdp"), dict(dp_shard=2)]
    )
    assert moving == pytest.approx(stages(tmp_path / "still", [{}] * 4), rel=1e-5)
