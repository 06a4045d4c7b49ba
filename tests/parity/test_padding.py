"""Padding has no part in statistics of routers: transformers' definition with a mask, and the text without padding."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch

from moescale.config import ModelConfig
from moescale.kernels.attention import Documents
from moescale.models.transformer import Transformer
from tests.parity import test_gpt_oss as gpt_oss
from tests.parity import test_olmoe as olmoe
from tests.parity import test_qwen3_moe as qwen3_moe
from tests.parity.test_parity import (
    Outcome,
    batch_of,
    error,
    export,
    gradients_by_published_name,
    initialized,
    load,
    transformers_gradients,
)
from tiny import tiny_config, tiny_glm_config, tiny_v3_config

ALPHA = 0.3
WIDE = dict(initializer_std=0.2, aux_loss_alpha=ALPHA)
BALANCED_BY_BATCH = {"qwen3_moe": qwen3_moe.TINY, "olmoe": olmoe.TINY, "gpt_oss": gpt_oss.TINY}
BALANCED_BY_SEQUENCE = {
    "deepseek_v2": tiny_config(**WIDE),
    "deepseek_v2_in_groups": tiny_config(
        **WIDE, routing_method="group_limited_greedy", num_groups=4, top_k_groups=2, normalize_topk=True
    ),
    "deepseek_v3": tiny_v3_config(**WIDE),
    "deepseek_v3_in_groups": tiny_v3_config(**WIDE, num_groups=4, top_k_groups=2),
    "glm4_moe_lite": tiny_glm_config(**WIDE),
}


def padded(tokens: torch.Tensor, targets: torch.Tensor, last: list[int], first: list[int]) -> dict[str, Any]:
    """The model's arguments where row ``i`` has text from ``first[i]`` up to ``last[i]`` and padding elsewhere."""
    places = torch.arange(tokens.shape[1])
    is_text = (places >= torch.tensor(first)[:, None]) & (places < torch.tensor(last)[:, None])
    is_learned = is_text & (places < torch.tensor(last)[:, None] - 1)
    starts = places == torch.tensor(first)[:, None]
    return dict(
        tokens=tokens,
        targets=targets.where(is_learned, -100),
        documents=Documents.from_starts(starts, tokens.device),
        padding=~is_text,
    )


def trained(model: Transformer, arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of the losses, auxiliary loss and load; the gradients are the parameters'."""
    output = model(**arguments)
    assert output.loss_sum is not None and output.tokens_per_expert is not None
    (output.loss_sum / (arguments["targets"] >= 0).sum() + ALPHA * output.aux_loss).backward()
    return output.loss_sum.detach(), output.aux_loss.detach(), output.tokens_per_expert


def gradients_of(model: Transformer) -> dict[str, torch.Tensor]:
    """Every gradient; none is left in the model."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def run_transformers(hf_model: torch.nn.Module, config: ModelConfig, arguments: dict[str, Any]) -> Outcome:
    """Auxiliary loss, loss and gradients, with transformers' auxiliary loss of each layer by itself."""
    module = importlib.import_module(type(hf_model).__module__)
    mask = (~arguments["padding"]).long()
    hf_model.router_aux_loss_coef = 0.0  # that of all layers' logits together
    output = hf_model(
        arguments["tokens"],
        attention_mask=mask,
        labels=torch.nn.functional.pad(arguments["targets"][:, :-1], (1, 0), value=-100),  # it shifts them itself
        output_router_logits=True,
    )
    assert len(output.router_logits) == config.num_moe_layers
    layers = [
        module.load_balancing_loss_func((logits,), config.num_experts, config.top_k, mask)
        for logits in output.router_logits
    ]
    aux_loss = torch.stack(layers).sum() / config.top_k  # of counts, which here are shares of the rows
    (output.loss + ALPHA * aux_loss).backward()
    return aux_loss.detach(), output.loss.detach(), transformers_gradients(hf_model)


@pytest.mark.parametrize("first", [[0, 0], [0, 9]], ids=["right", "left"])
@pytest.mark.parametrize("family", BALANCED_BY_BATCH)
def test_auxiliary_loss_and_gradients_equal_those_of_transformers_with_a_mask(family, first, tmp_path):
    config = dataclasses.replace(BALANCED_BY_BATCH[family], aux_loss_alpha=ALPHA)
    model = initialized(config)
    arguments = padded(*batch_of(config), last=[25, 40], first=first)
    loss_sum, aux_loss, load_of_experts = trained(model, arguments)
    assert load_of_experts.sum(-1).tolist() == [(65 - sum(first)) * config.top_k] * config.num_moe_layers
    hf_model = load(export(config, model, tmp_path), torch.float32)
    hf_aux_loss, hf_loss, hf_gradients = run_transformers(hf_model, config, arguments)
    assert error(aux_loss, hf_aux_loss) < 1e-5
    assert error(loss_sum / (arguments["targets"] >= 0).sum(), hf_loss) < 1e-5
    gradients = gradients_by_published_name(model)
    assert gradients.keys() == hf_gradients.keys()
    for key, gradient in gradients.items():
        assert error(gradient, hf_gradients[key]) < 1e-5, key


@pytest.mark.parametrize("family", BALANCED_BY_SEQUENCE)
def test_padded_sequences_train_as_the_same_ones_cut_to_their_text(family):
    config = BALANCED_BY_SEQUENCE[family]
    model = initialized(config)
    whole = padded(*batch_of(config), last=[25, 40], first=[0, 9])
    loss_sum, aux_loss, load_of_experts = trained(model, whole)
    gradients = gradients_of(model)
    num_targets = int((whole["targets"] >= 0).sum())
    loss_of_parts, aux_of_parts, load_of_parts = torch.zeros(()), torch.zeros(()), torch.zeros_like(load_of_experts)
    for row, text in enumerate((slice(0, 25), slice(9, 40))):
        here = slice(row, row + 1), text
        output = model(whole["tokens"][here], targets=whole["targets"][here])
        (output.loss_sum / num_targets + ALPHA * output.aux_loss / 2).backward()
        loss_of_parts += output.loss_sum.detach()
        aux_of_parts += output.aux_loss.detach() / 2
        load_of_parts += output.tokens_per_expert
    assert error(loss_sum, loss_of_parts) < 1e-6
    assert error(aux_loss, aux_of_parts) < 1e-6
    assert torch.equal(load_of_experts, load_of_parts)
    for name, gradient in gradients_of(model).items():
        assert error(gradients[name], gradient) < 1e-5, name


@pytest.mark.parametrize("family", BALANCED_BY_SEQUENCE | BALANCED_BY_BATCH)
def test_a_padded_batch_trains_as_the_same_one_without_its_padding(family):
    config = dataclasses.replace((BALANCED_BY_SEQUENCE | BALANCED_BY_BATCH)[family], aux_loss_alpha=ALPHA)
    model = initialized(config)
    whole = padded(*batch_of(config), last=[29, 29], first=[0, 0])
    found = trained(model, whole)
    gradients = gradients_of(model)
    cut = trained(model, dict(tokens=whole["tokens"][:, :29], targets=whole["targets"][:, :29]))
    for ours, theirs in zip(found, cut, strict=True):
        assert error(ours, theirs) < 1e-6
    for name, gradient in gradients_of(model).items():
        assert error(gradients[name], gradient) < 1e-5, name


def test_recomputed_blocks_leave_padding_out_too():
    config = BALANCED_BY_SEQUENCE["deepseek_v2"]
    model = initialized(config)
    whole = padded(*batch_of(config), last=[25, 40], first=[0, 9])
    found = trained(model, whole)
    gradients = gradients_of(model)
    model.recompute_layers = frozenset(range(config.num_layers))
    again = trained(model, whole)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert all(torch.equal(gradients[name], gradient) for name, gradient in gradients_of(model).items())
