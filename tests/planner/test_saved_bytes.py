"""What the annotations say a layer keeps for its backward, against what autograd keeps of the real model, to the byte.

The model runs on fake tensors with its GPU operators: autograd records what they save without any of them computing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moescale.config import ModelConfig
from moescale.convert.hf_config import read_model_config
from moescale.lora import LoraSettings, parse_lora
from moescale.models.blocks.rope import rope_tables
from moescale.models.fp8_gemms import use_fp8
from moescale.models.lora import add_adapters
from moescale.models.transformer import Transformer, build_on_meta
from moescale.plan import LayerPlan, MeshShape
from moescale.planner import layer_bytes
from moescale.planner.axes.registry import micro_batch
from moescale.planner.cluster import load_cluster
from moescale.planner.problem import Problem
from moescale.planner.request import Gemms, PlanRequest
from moescale.planner.workload import build_workload, saved_bytes
from tiny import tiny_config, tiny_v3_config

SEQUENCES, LENGTH = 2, 64
COPIES = ("copies", "gate_up_copies", "down_copies")
"""Attributes of modules that multiply in fp8."""
CONFIGS = {
    "plain": tiny_config(hidden_size=64),
    "low_rank_query": tiny_config(hidden_size=64, q_lora_rank=24),
    "no_shared_experts": tiny_config(num_shared_experts=0, top_k=3),
    "choice_by_sigmoid_and_bias": tiny_v3_config(num_groups=4, top_k_groups=2),
    "published_sizes": tiny_config(
        hidden_size=2048,
        num_heads=16,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        dense_intermediate_size=10944,
        expert_intermediate_size=1408,
        num_experts=64,
        num_shared_experts=2,
        top_k=6,
    ),
}


def fake_model(config: ModelConfig, lora: LoraSettings | None = None) -> Transformer:
    """The model with parameters on a fake CPU; call it inside a FakeTensorMode."""
    model = build_on_meta(config, torch.bfloat16)
    if lora is not None:
        add_adapters(model, lora)
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


def bytes_kept(run: Callable[[], Any], not_counted: list[torch.Tensor]) -> int:
    """Bytes of the storages autograd keeps while ``run`` runs, each once."""
    kept: dict[int, int] = {}
    known = {tensor.untyped_storage()._cdata for tensor in not_counted}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Scalars (random seeds of attention's dropout) are not what fills a GPU.
        if storage._cdata not in known and tensor.dim() > 0:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result is not None
    return sum(kept.values())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "moe"])
def test_a_layer_keeps_exactly_what_its_annotations_say(name: str, layer: int, gpu_operators: None) -> None:
    config = CONFIGS[name]
    model = fake_model(config)
    mode = next(model.parameters()).fake_mode
    with mode:
        x = torch.empty(SEQUENCES, LENGTH, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        cos, sin = rope_tables(config, LENGTH, torch.device("cpu"))
        measured = bytes_kept(lambda: model.layers[layer](x, cos, sin), [cos, sin, *model.parameters()])
    workload = build_workload(config)
    dims = workload.dims(SEQUENCES * LENGTH, LENGTH)
    assert saved_bytes(workload.layers[layer], dims, 2) == measured


@pytest.mark.parametrize("name", ["low_rank_query", "published_sizes"])
@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "moe"])
def test_a_layer_in_fp8_keeps_all_but_the_activation_of_a_dense_mlp(name: str, layer: int, gpu_operators: None) -> None:
    config = dataclasses.replace(CONFIGS[name], expert_intermediate_size=48)
    model = fake_model(config)
    with next(model.parameters()).fake_mode:
        use_fp8(model, experts=True, dense=True)
        copies = [getattr(module, name, None) for module in model.modules() for name in COPIES]
        of_weights = [tensor for found in copies if found is not None for tensor in found]
        x = torch.empty(SEQUENCES, LENGTH, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        cos, sin = rope_tables(config, LENGTH, torch.device("cpu"))
        measured = bytes_kept(lambda: model.layers[layer](x, cos, sin), [cos, sin, *of_weights, *model.parameters()])
    request = PlanRequest(runtime_gpus=1, plan_gpus=1, tokens_per_step=4096, sequence_length=LENGTH, fp8_gemms=True)
    problem = Problem(build_workload(config), load_cluster("h200"), request)
    kind, in_fp8 = problem.workload.layers[layer], Gemms(expert_gemms="fp8", dense_gemms="fp8")
    made_again = problem.made_again(kind, in_fp8)
    assert made_again == {"shared_activation" if layer else "dense_activation"}
    assert saved_bytes(kind, problem.dims(SEQUENCES), 2, made_again) == measured
    batch = micro_batch(problem, MeshShape(), SEQUENCES, "fsdp", "bf16", in_fp8)
    assert layer_bytes.kept(batch, kind, LayerPlan(kind=kind.name)) == measured


@pytest.mark.parametrize(
    "targets", ["all", "attention", "experts", "dense+shared", "kv_up+output", "all,base=fp8", "attention,base=fp8"]
)
@pytest.mark.parametrize("name", ["low_rank_query", "published_sizes"])
@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "moe"])
def test_a_frozen_layer_keeps_exactly_what_its_adapters_need(
    name: str, layer: int, targets: str, gpu_operators: None
) -> None:
    config, lora = CONFIGS[name], parse_lora(f"rank=8,targets={targets}")
    model = fake_model(config, lora)
    mode = next(model.parameters()).fake_mode
    with mode:
        x = torch.empty(SEQUENCES, LENGTH, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        cos, sin = rope_tables(config, LENGTH, torch.device("cpu"))
        measured = bytes_kept(lambda: model.layers[layer](x, cos, sin), [cos, sin, *model.parameters()])
    workload = build_workload(config, lora=lora)
    assert saved_bytes(workload.layers[layer], workload.dims(SEQUENCES * LENGTH, LENGTH), 2) == measured


@pytest.mark.parametrize("name", CONFIGS)
def test_the_whole_model_keeps_its_layers_and_what_is_outside(name: str, gpu_operators: None) -> None:
    config = CONFIGS[name]
    model = fake_model(config)
    mode = next(model.parameters()).fake_mode
    with mode:
        tokens = torch.empty(SEQUENCES, LENGTH, dtype=torch.int64)
        tables = 2 * LENGTH * config.qk_rope_head_dim // 2 * 4
        measured = bytes_kept(lambda: model(tokens, tokens), [tokens, *model.parameters()]) - tables
    workload = build_workload(config)
    dims = workload.dims(SEQUENCES * LENGTH, LENGTH)
    expected = sum(kind.count * saved_bytes(kind, dims, 2) for kind in workload.layers)
    assert expected + saved_bytes(workload.outside, dims, 2) == measured


@pytest.mark.parametrize(
    ("model", "num_key_value_heads"),
    [("qwen3-30b-a3b", 1), ("qwen3-30b-a3b", 2), ("qwen3-30b-a3b", 4), ("olmoe-1b-7b", 2)],
)
def test_a_layer_of_grouped_queries_keeps_exactly_what_its_annotations_say(
    model: str, num_key_value_heads: int, gpu_operators: None
) -> None:
    config = dataclasses.replace(
        read_model_config(model),
        hidden_size=128,
        num_layers=2,
        num_heads=4,
        num_key_value_heads=num_key_value_heads,
        head_dim=32,
        vocab_size=96,
        aux_loss_per_sequence=True,  # counts by sequence are kept, the larger case and what the annotation says
    )
    model = fake_model(config)
    with next(model.parameters()).fake_mode:
        x = torch.empty(SEQUENCES, LENGTH, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        cos, sin = model.positions(config, LENGTH, torch.device("cpu"))
        measured = bytes_kept(lambda: model.layers[0](x, cos, sin), [cos, sin, *model.parameters()])
    workload = build_workload(config)
    (kind,) = workload.layers
    assert saved_bytes(kind, workload.dims(SEQUENCES * LENGTH, LENGTH), 2) == measured


def test_a_layer_with_sinks_and_biases_keeps_exactly_what_its_annotations_say(gpu_operators: None) -> None:
    config = dataclasses.replace(
        read_model_config("gpt-oss-20b"),
        hidden_size=64,
        num_layers=2,
        windowed_layers=(0,),
        num_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        expert_intermediate_size=48,
        vocab_size=96,
        aux_loss_per_sequence=True,
    )
    model = fake_model(config)
    with next(model.parameters()).fake_mode:
        x = torch.empty(SEQUENCES, LENGTH, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        cos, sin = model.positions(config, LENGTH, torch.device("cpu"))
        measured = [
            bytes_kept(lambda layer=layer: layer(x, cos, sin), [cos, sin, *model.parameters()])
            for layer in model.layers
        ]
    workload = build_workload(config)
    (kind,) = workload.layers
    assert [saved_bytes(kind, workload.dims(SEQUENCES * LENGTH, LENGTH), 2)] * 2 == measured
