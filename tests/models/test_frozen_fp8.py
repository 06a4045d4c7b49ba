"""Frozen weights in fp8: a model computes, to the bit, as one whose frozen weights are what the codes stand for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moescale.boxes import Box, num_elements
from moescale.config import ModelConfig
from moescale.convert.hf_config import read_model_config
from moescale.kernels.block_fp8 import CODE_DTYPE, BlockFp8, plain, quantize
from moescale.lora import LoraSettings
from moescale.models.frozen_fp8 import quantize_into, weights_in_fp8
from moescale.models.lora import add_adapters, is_adapter
from moescale.models.transformer import Transformer, build_on_meta, initialize
from moescale.runtime.mapping import compile_layers
from moescale.runtime.micro_batch import MicroBatches
from moescale.runtime.optimizer import AdamW
from moescale.runtime.settings import TrainSettings
from tests.parity.test_parity import batch_of
from tiny import randomize_adapters, tiny_config

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
    randomize_adapters(model)
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


def cases() -> list:
    """Every family with both targets and in both types; every two of them in the ordinary tests."""
    found = []
    for number, name in enumerate(FAMILIES):
        for targets in ("all", "attention"):
            for dtype in (torch.float32, torch.bfloat16):
                is_slow = ((targets == "all") == (dtype == torch.float32)) == number % 2
                label = f"{name}-{targets}-{'fp32' if dtype == torch.float32 else 'bf16'}"
                marks = pytest.mark.slow if is_slow else ()
                found.append(pytest.param(name, targets, dtype, id=label, marks=marks))
    return found


@pytest.mark.parametrize(("name", "targets", "dtype"), cases())
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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("way", ["block", "experts", pytest.param("compiled", marks=pytest.mark.slow)])
def test_recomputed_and_compiled_layers_make_the_same_plain_weights(way: str) -> None:
    pairs = pair(FAMILIES["wider than a block"], LoraSettings(rank=4, alpha=6), torch.bfloat16)
    options = dict(compiled=True) if way == "compiled" else dict(recompute=way)
    found, wanted = (run(model, **options) for model in pairs)
    for key, value in wanted.items():
        assert torch.equal(found[key], value) and value.any(), key


def test_router_norms_biases_embedding_and_output_are_kept_whole() -> None:
    for config in FAMILIES.values():
        model = with_base(config, LoraSettings(rank=4, alpha=6, targets=("attention",)), "fp8", torch.bfloat16)
        in_fp8 = weights_in_fp8(model)
        for name, parameter in model.named_parameters():
            if name in in_fp8:
                assert parameter.dtype == CODE_DTYPE and not parameter.requires_grad, name
            elif name in in_fp8.values() or is_adapter(name):
                assert parameter.dtype == torch.float32, name
            else:
                assert parameter.dtype == torch.bfloat16, name
                kept = ("norm.weight", "bias", "sinks", "router.weight", "embedding.weight", "output.weight")
                assert name.endswith(kept), name


@pytest.mark.parametrize("shape", [(300, 200), (5, 300, 150)])
def test_any_part_is_quantised_to_the_bits_of_the_whole(shape: tuple[int, ...]) -> None:
    """Whatever rows or experts a rank holds of the codes, and whichever of the scales."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    whole = quantize(weight)
    asked: list[int] = []

    def read(box: Box) -> torch.Tensor:
        asked.append(num_elements(box))
        return weight[box]

    for number in range(40):
        boxes = []
        for tensor in whole:
            bounds = (torch.randint(0, size + 1, (2,), generator=generator).sort().values for size in tensor.shape[:-1])
            boxes.append((*(slice(int(a), int(b)) for a, b in bounds), slice(0, tensor.shape[-1])))
        codes, scales = (torch.empty_like(tensor[box]) for tensor, box in zip(whole, boxes, strict=True))
        squares = quantize_into(codes, boxes[0], scales, boxes[1], shape, read)
        assert torch.equal(codes.float(), whole.codes[boxes[0]].float()), number
        assert torch.equal(scales, whole.scales[boxes[1]]), number
        off = (plain(whole, torch.float32) - weight)[boxes[0]].double().square().sum()
        torch.testing.assert_close(squares, torch.stack([off, weight[boxes[0]].double().square().sum()]))
    assert max(asked) <= shape[-1] * shape[-2], "one matrix at a time"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Argument aux_data", "ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("targets", ["all", "attention"])
def test_a_recorded_micro_batch_in_fp8_is_that_of_plain_weights(targets: str, recompute: bool) -> None:
    """As a run does it on a GPU: layers compiled, the third micro-batch on a replay."""
    sizes = dict(hidden_size=256, dense_intermediate_size=512, expert_intermediate_size=192, kv_lora_rank=64)
    config = tiny_config(**sizes, num_heads=4, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64)
    results = []
    for model in pair(config, LoraSettings(rank=8, alpha=8, targets=(targets,)), torch.bfloat16):
        torch.compiler.reset()
        model.to("cuda")
        if recompute:
            model.recompute_layers = frozenset(range(config.num_layers))
        compile_layers(model)
        optimizer = AdamW(model.named_parameters(), TrainSettings())
        optimizer.accumulate_in_gemms(model)
        runner = MicroBatches(model, capture=True)
        runner.start_step(num_targets=4 * 128, num_micro_batches=4)
        for number in range(4):
            tokens = torch.randint(96, (2, 65), generator=torch.Generator().manual_seed(number))
            runner.run(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        assert runner._graph is not None
        results.append((runner.loss_sum.clone(), {n: optimizer.gradient(n).clone() for n in optimizer.parameters}))
    (loss, gradients), (wanted_loss, wanted) = results
    torch.testing.assert_close(loss, wanted_loss)
    for name, gradient in wanted.items():
        assert gradient.any()
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-2, atol=1e-5)
