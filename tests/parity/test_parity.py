"""Logits, loss and every gradient against transformers and against the published definition."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moescale.config import ModelConfig, YarnConfig
from moescale.convert.checkpoint_export import export_checkpoint
from moescale.convert.hf_config import to_hf_config, transformers_differences
from moescale.convert.key_table import build_key_table
from moescale.convert.tensor_source import ModelWeights
from moescale.kernels.router import Routing
from moescale.models.transformer import Transformer, build_on_meta, initialize, named_weights
from reference import forward
from tiny import tiny_config

YARN = YarnConfig(
    factor=8.0, original_max_sequence_length=32, beta_fast=32.0, beta_slow=1.0, mscale=0.707, mscale_all_dim=0.707
)
GROUPS = dict(routing_method="group_limited_greedy", num_groups=4, top_k_groups=2, num_experts=16, top_k=3)
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "yarn": dict(yarn=YARN),
    "yarn_unequal_mscales": dict(yarn=dataclasses.replace(YARN, mscale=1.0, mscale_all_dim=0.5, beta_fast=8.0)),
    "yarn_narrow_ramp": dict(yarn=dataclasses.replace(YARN, beta_fast=1.0, beta_slow=1.0), rope_theta=500.0),
    "q_lora": dict(q_lora_rank=24),
    "attention_bias": dict(q_lora_rank=24, attention_bias=True),
    "attention_bias_full_query": dict(attention_bias=True),
    "group_limited": dict(**GROUPS, routed_scaling_factor=16.0),
    "group_limited_single_expert_per_group": dict(
        routing_method="group_limited_greedy", num_groups=8, top_k_groups=3, top_k=3
    ),
    "scaled_routing": dict(routed_scaling_factor=2.5),
    "two_dense_layers": dict(num_layers=4, first_moe_layer=2),
    "no_dense_layer": dict(num_layers=2, first_moe_layer=0),
    "every_layer_dense": dict(num_layers=2, first_moe_layer=2),
    "tied_embeddings": dict(tie_embeddings=True),
    "two_shared_experts": dict(num_shared_experts=2),
    "one_expert_per_token": dict(top_k=1),
    "all_experts_chosen": dict(top_k=8),
    "norm_eps": dict(rms_norm_eps=1e-3, q_lora_rank=24),
    "wide_values": dict(v_head_dim=40, qk_nope_head_dim=8, qk_rope_head_dim=16),
    "batch_auxiliary_loss": dict(aux_loss_per_sequence=False),
    "deepseek_v2": dict(**GROUPS, q_lora_rank=24, yarn=YARN, num_shared_experts=2, routed_scaling_factor=16.0),
}
ONLY_BY_DEFINITION: dict[str, dict[str, Any]] = {
    "normalized_topk": dict(normalize_topk=True, routed_scaling_factor=3.0),
    "normalized_topk_group_limited": dict(**GROUPS, normalize_topk=True),
    "normalized_topk_of_one": dict(normalize_topk=True, top_k=1, routed_scaling_factor=3.0),
    "every_second_layer": dict(num_layers=5, moe_layer_frequency=2),
    "no_shared_experts": dict(num_shared_experts=0),
    "mscale_alone": dict(yarn=dataclasses.replace(YARN, mscale_all_dim=0.0)),
}


def build(overrides: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[ModelConfig, Transformer]:
    # A wide initialisation keeps the router's choices far from ties.
    config = tiny_config(**({"initializer_std": 0.2} | overrides))
    return config, initialized(config, dtype)


def initialized(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model with weights of which none is at a value where a missing one would go unnoticed."""
    model = build_on_meta(config, torch.float32).to_empty(device="cpu")
    initialize(model, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(torch.empty(parameter.shape).normal_(0, 0.2, generator=generator))
        for buffer in model.buffers():
            buffer.normal_(0, 0.2, generator=generator)
    return model.to(dtype)


def batch_of(config: ModelConfig, seed: int = 7, length: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (2, length), generator=generator)
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
    return tokens, targets


def export(config: ModelConfig, model: Transformer, folder: Path) -> Path:
    reference = folder / "reference"
    reference.mkdir()
    (reference / "config.json").write_text(json.dumps(to_hf_config(config, dtype="float32")))
    weights = ModelWeights(named_weights(model))
    export_checkpoint(config, weights, folder / "exported", reference=reference, dtype=torch.float32)
    return folder / "exported"


Outcome = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
"""Logits, mean loss, and every gradient under its Hugging Face name."""


def run(model: Transformer, tokens: torch.Tensor, targets: torch.Tensor, *, with_aux: bool) -> Outcome:
    model.zero_grad()
    with torch.no_grad():
        logits = model(tokens).logits
    output = model(tokens, targets=targets)
    loss = output.loss_sum / (targets >= 0).sum()
    total = loss + model.config.aux_loss_alpha * output.aux_loss if with_aux else loss
    total.backward()
    return logits, loss.detach(), gradients_by_published_name(model)


def gradients_by_published_name(model: Transformer) -> dict[str, torch.Tensor]:
    gradients = {}
    parameters = dict(model.named_parameters())
    for name, pieces in build_key_table(model.config).items():
        if name not in parameters:  # a buffer
            continue
        gradient = parameters[name].grad
        for piece in pieces:
            gradients[piece.key] = piece.to_stored(gradient[piece.index]).reshape(piece.shape)
    return gradients


def load(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def run_transformers(model: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> Outcome:
    model.zero_grad()
    output = model(tokens, labels=tokens)  # shifts labels itself: the same targets
    output.loss.backward()
    return output.logits.detach(), output.loss.detach(), transformers_gradients(model)


def transformers_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """transformers stacks experts in memory; its files, like ours, name each."""
    gradients = {}
    for name, parameter in model.named_parameters():
        prefix, _, kind = name.partition(".experts.")
        if not kind or model.config.model_type == "gpt_oss":  # whose files stack them too
            gradients[name] = parameter.grad
            continue
        for expert, gradient in enumerate(parameter.grad):
            parts = gradient.chunk(2) if kind == "gate_up_proj" else (gradient,)
            for part, gradient_part in zip(("gate", "up") if len(parts) == 2 else ("down",), parts, strict=True):
                gradients[f"{prefix}.experts.{expert}.{part}_proj.weight"] = gradient_part
    return gradients


def error(got: torch.Tensor, wanted: torch.Tensor | None) -> float:
    """Norm of the difference relative to that of what is wanted; None stands for a gradient of zeros."""
    got = got.detach().double()
    if wanted is None:
        return float(got.norm())
    wanted = wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_fp32_equals_transformers(name, tmp_path):
    assert_fp32_equals_transformers(*build(CONFIGURATIONS[name]), tmp_path)


def assert_fp32_equals_transformers(
    config: ModelConfig, model: Transformer, tmp_path: Path, transformers_class: type = torch.nn.Module
) -> dict[str, torch.Tensor]:
    """Logits, loss and every gradient, where transformers reads the model as ``transformers_class``; the gradients."""
    assert not transformers_differences(config)
    batch = batch_of(config)
    logits, loss, gradients = run(model, *batch, with_aux=False)
    hf_model = load(export(config, model, tmp_path), torch.float32)
    assert isinstance(hf_model, transformers_class)
    hf_logits, hf_loss, hf_gradients = run_transformers(hf_model, *batch)
    assert error(logits, hf_logits) < 1e-5
    assert error(loss, hf_loss) < 1e-5
    assert gradients.keys() == hf_gradients.keys()
    for key, gradient in gradients.items():
        assert error(gradient, hf_gradients[key]) < 1e-5, key
    return gradients


def ordinary(configurations: Iterable[str], *names: str) -> list:
    """The configurations, those not named for the slow tests: fp32 is compared in all of them in the ordinary ones."""
    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in configurations]


IN_BF16 = ("plain", "wide_values", "deepseek_v2")


@pytest.mark.parametrize("name", ordinary(CONFIGURATIONS, *IN_BF16))
def test_bf16_error_is_at_most_twice_that_of_transformers(name, tmp_path):
    assert_bf16_error_is_at_most_twice_that_of_transformers(*build(CONFIGURATIONS[name]), tmp_path)


def assert_bf16_error_is_at_most_twice_that_of_transformers(
    config: ModelConfig, model: Transformer, tmp_path: Path
) -> None:
    with torch.no_grad():  # weights that bf16 represents, so that all three start from the same
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    folder = export(config, model, tmp_path)
    exact_model, hf_model, model = load(folder, torch.float32), load(folder, torch.bfloat16), model.bfloat16()
    squares: dict[str, list[float]] = {}  # per quantity: ours, transformers', pooled over batches
    for batch in batches_without_near_ties(config, exact_model, hf_model, model, number=16):
        exact, hf = run_transformers(exact_model, *batch), run_transformers(hf_model, *batch)
        ours = run(model, *batch, with_aux=False)
        assert abs(ours[1] - exact[1]) <= 2 * max(abs(hf[1] - exact[1]), exact[1] * 2**-9)
        for key, wanted in (exact[2] | {"logits": exact[0]}).items():
            for column, found in enumerate((ours, hf)):
                got = found[0] if key == "logits" else found[2][key]
                squares.setdefault(key, [0.0, 0.0])[column] += float((got.double() - wanted.double()).square().sum())
    for key, (ours_squared, hf_squared) in squares.items():
        assert ours_squared**0.5 <= 2 * hf_squared**0.5, key


def batches_without_near_ties(
    config: ModelConfig, exact: torch.nn.Module, hf: torch.nn.Module, ours: Transformer, number: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches whose tokens go to the same experts in all three: rounding that flips a choice is another function."""
    found = []
    for seed in range(400):
        batch = batch_of(config, seed=seed, length=10)
        for first, second, third in zip(*(chosen_experts(model, batch[0]) for model in (exact, hf, ours)), strict=True):
            if not (torch.equal(first, second) and torch.equal(first, third)):
                break
        else:
            found.append(batch)
        if len(found) == number:
            return found
    raise AssertionError("nearly every batch tried has a near tie in routing")


@torch.no_grad()
def chosen_experts(model: torch.nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Per MoE layer the sorted expert ids [T, K] of either implementation's router."""
    found = []
    hooks = [
        module.register_forward_hook(
            lambda _module, _input, output: found.append(
                (output.topk_ids if isinstance(output, Routing) else output[2]).long().sort(-1).values
            )
        )
        for name, module in model.named_modules()
        if name.endswith((".mlp.gate", ".mlp.router", ".feed_forward.router"))
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", [*CONFIGURATIONS, *ONLY_BY_DEFINITION])
def test_fp32_equals_the_published_definition_auxiliary_loss_included(name, tmp_path):
    config, model = build((CONFIGURATIONS | ONLY_BY_DEFINITION)[name] | {"aux_loss_alpha": 0.3})
    assert bool(transformers_differences(config)) == (name in ONLY_BY_DEFINITION and name != "normalized_topk_of_one")
    folder = export(config, model, tmp_path)
    stored = load_file(folder / "model.safetensors")
    weights = {key: value.double().requires_grad_() for key, value in stored.items()}
    tokens, targets = batch_of(config)
    document = json.loads((folder / "config.json").read_text())
    wanted_logits, wanted_loss, wanted_aux = forward(document, weights, tokens, targets)
    (wanted_loss + 0.3 * wanted_aux).backward()
    logits, loss, gradients = run(model, tokens, targets, with_aux=True)
    assert error(logits, wanted_logits.detach()) < 1e-5
    assert error(loss, wanted_loss) < 1e-5
    if config.num_moe_layers:
        assert error(model(tokens, targets=targets).aux_loss, wanted_aux) < 1e-5
    assert gradients.keys() == weights.keys()
    for key, gradient in gradients.items():
        assert error(gradient, weights[key].grad) < 1e-5, key
