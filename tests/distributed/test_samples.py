"""Samples of a run whose model is sharded, or whose experts are on two ranks, are those of one device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gloo_ranks import GlooRanks
from moescale.models.greedy import decode_greedily
from moescale.report.metrics import Sample
from moescale.runtime.ranks import current_ranks
from moescale.runtime.samples import Sampler
from plans import make_trainer
from tiny import tiny_v3_config


@dataclass
class FakePrompt:
    tokens: list[int]
    sequence: int = 0
    wanted: tuple[int, ...] = ()


PROMPTS = [FakePrompt([5, 17, 80, 3, 41]), FakePrompt([9]), FakePrompt([62, 28, 77, 1])]


def train_and_sample(folder: Path, fields: dict[str, Any], end_tokens: list[int]) -> tuple[list[Any], list[float]]:
    """Samples after the second and fourth step, and the losses. Only the first rank knows the end tokens."""
    settings = dict(sample_every=2 if end_tokens is not None else 0, final_checkpoint=False)
    one = make_trainer(
        folder, total_steps=4, model=dict(initializer_std=0.2), build_config=tiny_v3_config, settings=settings, **fields
    )
    one.sampler = Sampler(
        prompts=PROMPTS,
        max_tokens=10,
        end_tokens=(end_tokens or []) if current_ranks().is_first else [],
        to_text=lambda tokens: " ".join(map(str, tokens)),
    )
    seen: list[tuple[int, list[Sample]]] = []
    one.observer.on_samples = lambda step, samples: seen.append((step, samples))
    one.train()
    assert one.model.training
    return seen, one.observer.losses


@pytest.fixture(scope="module")
def two_ranks():
    group = GlooRanks(2)
    yield group
    group.close()


@pytest.fixture(scope="module")
def alone():
    return train_and_sample(Path("unused"), {}, [])


def test_samples_come_when_they_are_due_and_change_nothing(alone):
    seen, losses = alone
    assert [step for step, _ in seen] == [2, 4]
    assert train_and_sample(Path("unused"), {}, None) == ([], losses)
    assert seen[0] != seen[1]  # the weights have moved
    assert [sample.prompt for sample in seen[0][1]] == ["5 17 80 3 41", "9", "62 28 77 1"]


def test_a_sample_is_what_greedy_decoding_gives(tmp_path):
    one = make_trainer(tmp_path, build_config=tiny_v3_config, model=dict(initializer_std=0.2))
    sampler = Sampler(prompts=PROMPTS, max_tokens=6, end_tokens=[], to_text=str)
    samples = sampler.samples(one.model, current_ranks(), lambda: None)
    wanted = [str(decode_greedily(one.model, prompt.tokens, max_tokens=6)) for prompt in PROMPTS]
    assert [sample.answer for sample in samples] == wanted


@pytest.mark.slow  # two more processes, which import torch
@pytest.mark.parametrize("layout", [dict(ep=2), dict(dense_sharding="fsdp"), dict(ep=2, dense_sharding="fsdp")])
def test_two_ranks_sample_as_one_device_does(two_ranks, alone, layout):
    end = int(alone[0][-1][1][0].answer.split()[4])
    wanted = train_and_sample(Path("unused"), {}, [end])[0]
    assert wanted != alone[0]
    for seen, losses in two_ranks.run(train_and_sample, Path("unused"), dict(dp_shard=2) | layout, [end]):
        assert seen == wanted
        assert losses == pytest.approx(alone[1], rel=1e-5)
