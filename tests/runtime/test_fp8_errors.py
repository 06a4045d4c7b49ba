"""The tokens for which a run measures what rounding to fp8 is off by: they have targets, and their documents."""

from __future__ import annotations

import pytest
import torch

from moescale.data.batch import Batch
from moescale.models.fp8_gemms import use_fp8, write_weight_copies
from moescale.models.transformer import Transformer, build_on_meta, initialize
from moescale.runtime.fp8_errors import PROBED_TOKENS, fp8_errors
from tiny import tiny_config

CONFIG = tiny_config(hidden_size=64, expert_intermediate_size=48, max_sequence_length=1024)
LENGTH = 2 * PROBED_TOKENS
GRADIENT = "linear gradient of the result"


@pytest.fixture
def model() -> Transformer:
    model = build_on_meta(CONFIG, torch.bfloat16).to_empty(device="cpu")
    initialize(model, seed=3)
    use_fp8(model, experts=True, dense=True)
    write_weight_copies(model)
    return model


def batch(starts: torch.Tensor | None = None) -> Batch:
    """Two sequences without a target."""
    tokens = torch.randint(CONFIG.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    targets = torch.full((2, LENGTH), -100)
    return Batch(tokens=tokens, targets=targets, sequence_ids=torch.arange(2), document_starts=starts, padding=None)


def measured(model: Transformer, *batches: Batch) -> dict[str, float]:
    found = fp8_errors(model, batches, lambda: model.zero_grad(set_to_none=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    return {name: errors.relative for name, errors in found.items()}


@pytest.mark.parametrize("first", [0, 300, LENGTH - 2])
def test_gradients_are_measured_of_an_answer_behind_a_long_prompt(model: Transformer, first: int) -> None:
    answered = batch()
    answered.targets[1, first:] = answered.tokens[1, first:]
    found = measured(model, batch(), answered)
    assert 0.015 < found[GRADIENT] < 0.045, "0 means that no token had a gradient"


def test_a_step_without_targets_has_no_errors(model: Transformer) -> None:
    assert measured(model, batch(), batch()) == {}


def test_attention_stays_within_documents(model: Transformer) -> None:
    found = []
    for every in (None, LENGTH, 2):
        starts = None if every is None else (torch.arange(LENGTH) % every == 0).expand(2, LENGTH)
        full = batch(starts)
        full.targets.copy_(full.tokens)
        found.append(measured(model, full)["linear input"])
    assert found[0] == pytest.approx(found[1], rel=1e-3), "one document is as none"
    assert found[2] != pytest.approx(found[1], rel=1e-3)
