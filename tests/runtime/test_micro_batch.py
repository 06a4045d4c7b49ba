"""Sums of a step's micro-batches; on a GPU, that a recorded micro-batch does what the plain one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moescale.models.transformer import Transformer, build_on_meta, initialize
from moescale.runtime.micro_batch import MicroBatches
from moescale.runtime.optimizer import AdamW, OptimizerFormat
from moescale.runtime.settings import TrainSettings
from synchronisation import synchronisation_refused
from tiny import tiny_config

SHAPE = (2, 32)


def documents_of(lengths: int) -> torch.Tensor:
    """Starts of documents of so many tokens each, and what is left of a sequence."""
    return (torch.arange(SHAPE[1]) % lengths == 0).repeat(SHAPE[0], 1)


def padding_of(number: int) -> torch.Tensor:
    """Padding at the ends of a micro-batch's sequences: ``number`` tokens in the first, twice as many in the second."""
    return torch.arange(SHAPE[1]) >= SHAPE[1] - number * torch.tensor([[1], [2]])


def batches(number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(96, SHAPE, generator=generator) for _ in range(number)]
    return [(t, torch.cat([t[:, 1:], torch.full((SHAPE[0], 1), -100)], dim=1)) for t in tokens]


def build(
    device: str, dtype: torch.dtype, *, capture: bool, **overrides: Any
) -> tuple[Transformer, AdamW, MicroBatches]:
    # Sizes that the GPU kernels take: multiples of 8.
    model = build_on_meta(tiny_config(**overrides), dtype).to_empty(device=device)
    initialize(model, 0)
    optimizer = AdamW(model.named_parameters(), TrainSettings(), OptimizerFormat(master="bf16_remainder"))
    optimizer.accumulate_in_gemms(model)
    return model, optimizer, MicroBatches(model, capture=capture)


def test_sums_are_those_of_all_micro_batches_and_start_anew_each_step():
    _, _, runner = build("cpu", torch.float32, capture=False)
    first, second = batches(2)
    sums = []
    for parts in ([first], [second], [first, second]):
        runner.start_step(num_targets=62 * len(parts), num_micro_batches=len(parts))
        for tokens, targets in parts:
            runner.run(tokens, targets, None)
        sums.append([float(runner.loss_sum), float(runner.aux_loss)])
    assert sums[2] == pytest.approx([a + b for a, b in zip(sums[0], sums[1], strict=True)], rel=1e-6)
    assert runner.expert_rows.sum(-1).tolist() == [2 * 64 * 2] * 2  # two micro-batches of 64 tokens, top-2, per layer


def test_rows_of_padding_are_not_counted():
    _, _, runner = build("cpu", torch.float32, capture=False)
    ((tokens, targets),) = batches(1)
    runner.start_step(num_targets=62, num_micro_batches=1)
    runner.run(tokens, targets, documents_of(9), padding_of(4))
    assert runner.expert_rows.sum(-1).tolist() == [(64 - 12) * 2] * 2


CONFIGS = {
    "plain": {},
    "biases, compressed query": dict(attention_bias=True, q_lora_rank=24),
    "tied embeddings": dict(tie_embeddings=True),
}


def accumulated(overrides: dict[str, Any], way: str, *, in_products: bool) -> tuple[AdamW, set[str]]:
    """The gradients of two micro-batches in bf16, and the parameters whose gradient autograd handed out."""
    model = build_on_meta(tiny_config(**overrides), torch.bfloat16).to_empty(device="cpu")
    initialize(model, 0)
    handed_out: set[str] = set()
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda parameter, name=name: handed_out.add(name) if parameter.grad is not None else None
        )
    optimizer = AdamW(model.named_parameters(), TrainSettings(), OptimizerFormat(gradients=torch.bfloat16))
    if in_products:
        optimizer.accumulate_in_gemms(model)
    if way == "recomputed":
        model.recompute_layers = frozenset(range(model.config.num_layers))
    elif way == "compiled":
        torch._dynamo.reset()
        for block in model.layers:
            block.compile(fullgraph=True, backend="aot_eager")
    runner = MicroBatches(model, capture=False)
    runner.start_step(num_targets=2 * 62, num_micro_batches=2)
    for tokens, targets in batches(2):
        runner.run(tokens, targets, None)
    return optimizer, handed_out


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler's own
@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=[pytest.mark.slow] if way == "compiled" and "biases" not in name else [])
        for name in CONFIGS
        for way in ("eager", "recomputed", "compiled")
    ],
)
def test_products_add_to_the_buffers_what_autograd_hands_out_otherwise(name, way):
    plain, everything = accumulated(CONFIGS[name], way, in_products=False)
    ours, handed_out = accumulated(CONFIGS[name], way, in_products=True)
    assert everything == set(plain.parameters)
    assert handed_out == {n for n in everything if n.endswith(("norm.weight", ".bias", "router.weight"))} | {
        "embedding.weight"
    }
    for key in plain.parameters:
        a, b = plain.gradient(key).float(), ours.gradient(key).float()
        # Each is a sum rounded to bf16 two or four times.
        assert (a - b).norm() <= 2**-7 * a.norm(), key
        assert a.any(), key


# The widths that attention in CuTe takes.
WIDE_HEADS = dict(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Argument aux_data")
@pytest.mark.parametrize("overrides", [{}, WIDE_HEADS], ids=["narrow", "wide"])
@pytest.mark.parametrize("with_padding", [False, True])
@pytest.mark.parametrize("with_documents", [False, True])
def test_a_recorded_micro_batch_gives_the_losses_and_gradients_of_the_plain_one(
    with_documents, with_padding, overrides
):
    results = []
    for capture in (False, True):
        _, optimizer, runner = build("cuda", torch.bfloat16, capture=capture, **overrides)
        runner.start_step(num_targets=5 * 62, num_micro_batches=5)
        for number, (tokens, targets) in enumerate(batches(5)):
            documents = documents_of(5 + number) if with_documents else None
            padding = padding_of(number) if with_padding else None
            runner.run(tokens.pin_memory(), targets.pin_memory(), documents, padding)
        torch.cuda.synchronize()
        assert (runner._graph is not None) == capture
        gradients = {name: optimizer.gradient(name).clone() for name in optimizer.parameters}
        results.append((runner.loss_sum.clone(), runner.expert_rows.clone(), gradients))
    (plain_loss, plain_rows, plain), (loss, rows, recorded) = results
    num_padding = sum(int(padding_of(number).sum()) for number in range(5)) if with_padding else 0
    assert rows.sum(-1).tolist() == [(5 * 64 - num_padding) * 2] * 2
    torch.testing.assert_close(loss, plain_loss)
    assert torch.equal(rows, plain_rows)
    for name, gradient in plain.items():
        torch.testing.assert_close(recorded[name], gradient, rtol=1e-2, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Argument aux_data")
@pytest.mark.parametrize("overrides", [{}, WIDE_HEADS], ids=["narrow", "wide"])
@pytest.mark.parametrize("with_documents", [False, True])
def test_forward_and_backward_never_wait_for_the_gpu(with_documents, overrides):
    _, _, runner = build("cuda", torch.bfloat16, capture=False, **overrides)
    inputs = [(tokens.cuda(), targets.cuda()) for tokens, targets in batches(3)]
    documents = documents_of(9) if with_documents else None
    runner.start_step(num_targets=62 * 3, num_micro_batches=3)
    runner.run(*inputs[0], documents)  # compiles, which may synchronise
    with synchronisation_refused():
        for tokens, targets in inputs[1:]:
            runner.run(tokens, targets, documents)
    assert runner.loss_sum.item() > 0


@pytest.mark.gpu
def test_what_comes_again_in_one_shape_is_recorded_and_another_shape_drops_it():
    _, _, runner = build("cuda", torch.float32, capture=True)
    assert not runner.capture  # fp32 gradients have no fixed address
    _, _, runner = build("cuda", torch.bfloat16, capture=True)
    runner.start_step(num_targets=62, num_micro_batches=2)
    ((tokens, targets),) = batches(1)
    runner.run(tokens, targets)
    for recorded, length in ((False, 9), (True, 5), (True, 9), (True, 32)):  # any number of documents that fits
        runner.run(tokens, targets, documents_of(length))
        assert (runner._graph is not None) == recorded
    for recorded in (False, True):
        runner.run(tokens[:1], targets[:1])
        assert (runner._graph is not None) == recorded


@pytest.mark.gpu
def test_more_documents_than_there_was_room_for_are_recorded_again(monkeypatch):
    monkeypatch.setattr("moescale.runtime.micro_batch.LEAST_OFFSETS", 4)
    _, _, runner = build("cuda", torch.bfloat16, capture=True)
    runner.start_step(num_targets=62, num_micro_batches=2)
    ((tokens, targets),) = batches(1)
    for recorded, length in ((False, 32), (True, 32), (False, 4), (True, 4), (True, 32)):
        runner.run(tokens, targets, documents_of(length))
        assert (runner._graph is not None) == recorded
