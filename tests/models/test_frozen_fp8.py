"""Frozen weights in fp8: a model computes, to the bit, as one whose frozen weights are what the codes stand for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moescale.config import ModelConfig
from moescale.convert.hf_config import read_model_config
from moescale.kernels.block_fp8 import BlockFp8, plain, quantize
from moescale.lora import LoraSettings
from moescale.models.frozen_fp8 import weights_in_fp8
from moescale.models.lora import add_adapters, is_adapter
from moescale.models.transformer import Transformer, build_on_meta, initialize
from tests.parity.test_parity import batch_of
from tiny import tiny_config

FAMILIES = {
    name: read_model_config(name)
    for name in ("tiny", "tiny-deepseek-v3", "tiny-glm4-moe-lite", "tiny-gpt-oss", "tiny-olmoe")
}
FAMILIES["wider than a block"] = tiny_config(hidden_size=144, dense_intermediate_size=160, expert_intermediate_size=136)
FAMILIES["compressed query, biases"] = tiny_config(q_lora_rank=24, attention_bias=True)


def with_base(config: ModelConfig, lora: LoraSettings, base: str, dtype: torch.dtype) -> Transformer:
    model = build_on_meta(config, dtype)
    add_adapters(model, dataclasses.replace(lora, base=base))
    initialize(model.to_empty(device="cpu"), seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.2, generator=generator))
    return model


def pair(config: ModelConfig, lora: LoraSettings, dtype: torch.dtype) -> tuple[Transformer, Transformer]:
    """A model in fp8, and one whose frozen weights are what the codes stand for."""
    in_fp8, whole = (with_base(config, lora, base, dtype) for base in ("fp8", "compute"))
    weights = weights_in_fp8(in_fp8)
    assert weights
    with torch.no_grad():
        for name, of_scales in weights.items():
            weight = whole.get_parameter(name)
            stored = BlockFp8(in_fp8.get_parameter(name), in_fp8.get_parameter(of_scales))
            assert torch.equal(stored.codes.float(), quantize(weight).codes.float()), "quantised from the same draws"
            weight.copy_(plain(stored, dtype))
    return in_fp8, whole


def run(model: Transformer, *, recompute: str = "none", compiled: bool = False) -> dict[str, torch.Tensor]:
    if recompute == "block":
        model.recompute_layers = frozenset(range(model.config.num_layers))
    for module in model.modules():
        if recompute == "experts" and hasattr(module, "recompute_up"):
            module.recompute_up = True
    if compiled:
        torch.compiler.reset()
        for block in model.layers:
            block.compile(fullgraph=True, backend="aot_eager")
    tokens, targets = batch_of(model.config)
    output = model(tokens, targets=targets)
    (output.loss_sum + 0.01 * output.aux_loss).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        return found | {"loss": output.loss_sum.detach(), "logits": model(tokens).logits}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("targets", ["all", "attention"])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_weights_that_are_what_the_codes_stand_for(
    name: str, targets: str, dtype: torch.dtype
) -> None:
    config = FAMILIES[name]
    if config.has_expert_biases and targets == "all":
        pytest.skip("no adapters on experts with biases")
    found, wanted = (run(model) for model in pair(config, LoraSettings(rank=4, alpha=6, targets=(targets,)), dtype))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value) and value.any(), key
