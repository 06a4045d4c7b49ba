"""The workload's counts against the real model and torch's own counter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moescale.config import ModelConfig
from moescale.convert.hf_config import read_model_config
from moescale.models.transformer import build_on_meta, initialize
from moescale.operators import forward_flops
from moescale.planner.workload import build_workload
from tiny import tiny_config

CONFIGS = {
    "coder_v2_lite": read_model_config("deepseek-coder-v2-lite"),
    "v2": read_model_config("deepseek-v2"),
    "tiny": tiny_config(),
    "moonlight": read_model_config("moonlight-16b-a3b"),
    "glm": read_model_config("glm-4.7-flash"),
    "qwen3": read_model_config("qwen3-30b-a3b"),
    "olmoe": read_model_config("olmoe-1b-7b"),
    "gpt_oss": read_model_config("gpt-oss-20b"),
    "dense": tiny_config(num_experts=None),
    "biases_and_tied": tiny_config(attention_bias=True, q_lora_rank=8, tie_embeddings=True, num_shared_experts=0),
    "every_other_layer": tiny_config(num_layers=7, moe_layer_frequency=2),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameters_are_those_of_the_model(config: ModelConfig) -> None:
    model = build_on_meta(config, torch.bfloat16)
    workload = build_workload(config)
    assert workload.parameters() == sum(parameter.numel() for parameter in model.parameters())
    for kind in workload.layers:
        layer = next(i for i in range(config.num_layers) if config.is_moe_layer(i) == (kind.name == "moe"))
        counted = {"routed": 0, "other": 0}
        for name, parameter in model.layers[layer].named_parameters():
            counted["routed" if ".experts." in f".{name}" and "shared" not in name else "other"] += parameter.numel()
        assert workload.layer_parameters(kind) == (counted["other"], counted["routed"])


def forward_flops_of(config: ModelConfig, tokens: int, length: int) -> float:
    workload = build_workload(config)
    dims = workload.dims(tokens, length)
    kinds = (*workload.layers, workload.outside)
    return sum(kind.count * forward_flops(op, dims) for kind in kinds for op in kind.operators)


DENSE = {
    "latent": tiny_config(num_experts=None, q_lora_rank=None),
    "latent_with_compressed_queries": tiny_config(num_experts=None, q_lora_rank=24),
    "grouped": dataclasses.replace(read_model_config("tiny-olmoe"), num_experts=None, num_key_value_heads=2),
}


@pytest.mark.parametrize("config", DENSE.values(), ids=DENSE)
def test_flops_are_those_that_torch_counts_on_a_dense_model(config: ModelConfig) -> None:
    model = build_on_meta(config, torch.float32).to_empty(device="cpu")
    initialize(model, seed=0)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 64, dtype=torch.long))
    dims = build_workload(config).dims(64, 64)
    half_square = config.num_layers * config.num_heads * 64 * 64 * (dims["q"] + dims["v"])
    counted = counter.get_total_flops()
    # The counter takes the whole square of attention, or nothing where it has no formula for the CPU's kernel.
    assert forward_flops_of(config, 64, 64) in (counted - half_square, counted + half_square)


def test_the_backward_of_every_product_is_two_products() -> None:
    workload = build_workload(CONFIGS["v2"])
    for kind in (*workload.layers, workload.outside):
        for op in kind.operators:
            assert op.backward_flops_ratio == 2.0 or op.kind == "elementwise"
