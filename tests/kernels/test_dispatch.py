"""The exchange between ranks, with all ranks played by one process: their blocks are tensors of the same device.

On the CPU in Triton's interpreter, on a GPU for real. What is compared is a layer's whole forward and backward with the
definition on all experts, and the row order with cases worked out by hand.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch

from moescale.kernels.backends import triton_interpreted
from moescale.kernels.block_fp8 import plain, quantize
from moescale.kernels.dispatch.buffers import ExchangeBuffers, ExchangeShape
from moescale.kernels.experts import ExpertBiases, SwigluClamp, operators_of
from moescale.kernels.experts.adapted import ExpertAdapters
from moescale.kernels.experts.reference import experts_reference
from moescale.kernels.experts.sort import sort_pairs
from moescale.kernels.fp8 import copies_of, routed
from moescale.kernels.fp8.scaled import Scaled

if not torch.cuda.is_available() and not triton_interpreted():
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

from moescale.kernels.dispatch import fp8_mlp, mlp  # noqa: E402
from moescale.kernels.dispatch.triton import (  # noqa: E402
    order_rows,
    publish_pairs,
    pull_rows,
    pull_scaled_rows,
    pull_sums,
    pull_values,
)
from moescale.kernels.fp8 import triton as fp8  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXPERTS, HIDDEN, WIDTH = 8, 32, 16


class Rank(NamedTuple):
    """One rank's inputs and what the layer made of them."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    grad: torch.Tensor


def shape_of(num_ranks: int, num_tokens: int, top_k: int, experts: int = EXPERTS) -> ExchangeShape:
    return ExchangeShape(
        num_ranks=num_ranks,
        num_tokens=num_tokens,
        hidden_size=HIDDEN,
        num_experts=experts,
        top_k=top_k,
        dtype=torch.float32,
    )


def make_buffers(shape: ExchangeShape) -> list[ExchangeBuffers]:
    """The buffers of all ranks, full of NaN and of ids that do not exist."""
    blocks = [torch.full((shape.num_bytes,), 255, dtype=torch.uint8, device=DEVICE) for _ in range(shape.num_ranks)]
    addresses = [block.data_ptr() for block in blocks]
    return [ExchangeBuffers.carve(shape, rank, block, addresses) for rank, block in enumerate(blocks)]


def make_rank(num_tokens: int, top_k: int, choice: str, rank: int, num_ranks: int) -> Rank:
    generator = torch.Generator().manual_seed(rank * 7 + top_k)
    scores = torch.rand(num_tokens, EXPERTS, generator=generator)
    if choice == "one rank":  # all rows to the last rank, as far as a token's ids must differ
        scores[:, EXPERTS - EXPERTS // num_ranks :] += 1
    elif choice == "one expert":
        scores[:, 3] += 1
    elif choice == "ten times":
        scores[:, 1] += 0.9 * (torch.rand(num_tokens, generator=generator) < 0.9)
    ids = scores.topk(top_k).indices.to(torch.int32)
    if choice == "some nowhere":
        ids[::3, 0] = -1
    return Rank(
        x=torch.randn(num_tokens, HIDDEN, generator=generator).to(DEVICE),
        ids=ids.to(DEVICE),
        weights=torch.rand(num_tokens, top_k, generator=generator).to(DEVICE),
        grad=torch.randn(num_tokens, HIDDEN, generator=generator).to(DEVICE),
    )


def publish(buffers: ExchangeBuffers, rank: Rank) -> None:
    _, pair_rows, ends = sort_pairs(rank.ids, EXPERTS, backend="triton")
    publish_pairs(buffers, rank.ids, rank.weights, pair_rows, ends)
    buffers.tokens.local[: len(rank.x)] = rank.x


def marked(*cases: tuple) -> list:
    """Cases of which those that begin with "slow" are run with the slow tests."""
    return [pytest.param(*c[1:], marks=pytest.mark.slow) if c[0] == "slow" else pytest.param(*c) for c in cases]


@pytest.mark.parametrize(
    ("choice", "kept"),
    marked(
        ("random", "all"),
        ("slow", "random", "some"),
        ("slow", "one expert", "all"),
        ("one expert", "some"),
        ("some nowhere", "all"),
        ("slow", "some nowhere", "some"),
    ),
)
def test_biases_and_the_clamped_activation_give_the_results_of_one_device(choice, kept) -> None:
    check_one_device((5, 3), 2, choice, kept, has_biases=True)


@pytest.mark.usefixtures("cute")
@pytest.mark.parametrize("has_biases", [True, False])
def test_products_in_cute_give_the_results_of_one_device(has_biases) -> None:
    check_one_device((5, 3), 2, "some nowhere", "some", has_biases, backend="cute")


def routings() -> list:
    """Ranks' tokens, choices and kept rows in all combinations; the ordinary tests have one of every kind at least."""
    ranks = [((5, 5), 2), ((6, 1), 3), ((3, 0), 1), ((4, 4, 4, 4), 2), ((2,) * 8, 3)]
    choices = ["random", "one rank", "one expert", "ten times", "some nowhere"]
    cases = []
    for i, (tokens, top_k) in enumerate(ranks):
        for j, choice in enumerate(choices):
            for k, kept in enumerate(["all", "some", "none"]):
                marks = () if (i + j) % 3 == k and (i + 2 * j) % 5 == 3 else pytest.mark.slow
                cases.append(pytest.param(tokens, top_k, choice, kept, marks=marks))
    return cases


@pytest.mark.parametrize(("tokens", "top_k", "choice", "kept"), routings())
def test_any_routing_gives_the_results_and_gradients_of_one_device(tokens, top_k, choice, kept) -> None:
    check_one_device(tokens, top_k, choice, kept, has_biases=False)


@pytest.mark.parametrize("kept", ["all", "some", pytest.param("none", marks=pytest.mark.slow)])
def test_frozen_experts_in_fp8_give_the_results_and_gradients_of_one_device(kept) -> None:
    check_one_device((6, 4), 3, "random", kept, has_biases=True, in_fp8=True)


def check_one_device(tokens, top_k, choice, kept, has_biases, in_fp8=False, backend="triton") -> None:
    num_ranks, num_local = len(tokens), EXPERTS // len(tokens)
    shape = shape_of(num_ranks, max(tokens), top_k)
    buffers = make_buffers(shape)
    kept_rows = {"all": shape.max_rows, "some": shape.num_pairs // 2, "none": 0}[kept]
    ranks = [make_rank(count, top_k, choice, rank, num_ranks) for rank, count in enumerate(tokens)]
    generator = torch.Generator().manual_seed(0)
    gate_up = (torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator) / 4).to(DEVICE)
    down = (torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator) / 4).to(DEVICE)
    ops = operators_of(backend)
    local = [slice(rank * num_local, (rank + 1) * num_local) for rank in range(num_ranks)]
    held: list = [(gate_up[part], down[part]) for part in local]
    if in_fp8:
        held = [tuple(quantize(weight) for weight in weights) for weights in held]
        gate_up, down = (torch.cat([plain(weights[which], torch.float32) for weights in held]) for which in (0, 1))
    biases, clamp = None, None
    options: list[dict] = [{} for _ in local]
    if has_biases:
        clamp = SwigluClamp(1.702, 0.5)
        sizes = (2 * WIDTH, HIDDEN)
        biases = ExpertBiases(*(torch.randn(EXPERTS, n, generator=generator).to(DEVICE) for n in sizes))
        options = [dict(biases=ExpertBiases(*(b[part] for b in biases)), clamp=clamp) for part in local]
    rows = torch.full((num_ranks, 2, shape.max_rows, HIDDEN), float("nan"), device=DEVICE)

    for buffer, rank in zip(buffers, ranks, strict=True):
        publish(buffer, rank)
    orders = [order_rows(buffer, kept_rows=kept_rows) for buffer in buffers]
    pres = []
    for number, (buffer, order) in enumerate(zip(buffers, orders, strict=True)):
        pull_rows(buffer, buffer.tokens, order, rows[number, 0])
        pre, _ = mlp.forward_rows(
            ops,
            rows[number, 0],
            *held[number],
            order,
            kept=kept_rows,
            expected_rows=shape.num_pairs,
            out=buffer.results.local,
            **options[number],
        )
        pres.append(pre)
    out = [
        pull_sums(buffer, order, len(rank.x), rank.weights)
        for buffer, order, rank in zip(buffers, orders, ranks, strict=True)
    ]

    for buffer, rank in zip(buffers, ranks, strict=True):
        buffer.results.local.fill_(float("nan"))
        buffer.gradients.local[: len(rank.x)] = rank.grad
    gradients = [torch.zeros_like(weight) for weight in (gate_up, down, *(biases or ()))]
    for number, (buffer, order) in enumerate(zip(buffers, orders, strict=True)):
        pull_rows(buffer, buffer.gradients, order, rows[number, 1])
        mlp.backward_rows(
            ops,
            rows[number, 0],
            rows[number, 1],
            pres[number],
            *held[number],
            order,
            expected_rows=shape.num_pairs,
            out=buffer.results.local,
            values=buffer.values.local,
            gate_up_gradient=gradients[0][local[number]],
            down_gradient=gradients[1][local[number]],
            bias_gradients=ExpertBiases(*(g[local[number]] for g in gradients[2:])) if has_biases else None,
            is_frozen=in_fp8,
            **options[number],
        )
    everywhere = [
        torch.cat([getattr(rank, name) for rank in ranks]).requires_grad_(name in ("x", "weights"))
        for name in ("x", "ids", "weights")
    ]
    parameters = [weight.clone().requires_grad_() for weight in (gate_up, down, *(biases or ()))]
    expected = experts_reference(
        *everywhere, *parameters[:2], ExpertBiases(*parameters[2:]) if has_biases else None, clamp
    )
    expected.backward(torch.cat([rank.grad for rank in ranks]))
    torch.testing.assert_close(torch.cat(out), expected.detach(), rtol=1e-4, atol=1e-5)
    grad_x = torch.cat([pull_sums(b, o, len(r.x)) for b, o, r in zip(buffers, orders, ranks, strict=True)])
    grad_weights = torch.cat([pull_values(b, o, len(r.x)) for b, o, r in zip(buffers, orders, ranks, strict=True)])
    torch.testing.assert_close(grad_x, everywhere[0].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_weights, everywhere[2].grad, rtol=1e-4, atol=1e-5)
    for ours, parameter in zip(gradients, parameters, strict=True) if not in_fp8 else ():
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "choice", "kept"),
    marked(((6, 4), "random", "some"), ((3, 0), "some nowhere", "none"), ("slow", (4, 4, 4, 4), "one rank", "all")),
)
def test_products_in_fp8_give_the_results_and_gradients_of_one_device_in_fp8(tokens, choice, kept, monkeypatch) -> None:
    monkeypatch.setattr(routed, "kernels_for", lambda tensor: fp8)
    num_ranks, num_local = len(tokens), EXPERTS // len(tokens)
    shape = dataclasses.replace(shape_of(num_ranks, max(tokens), 2), dtype=torch.bfloat16, in_fp8=True)
    buffers = make_buffers(shape)
    kept_rows = {"all": shape.max_rows, "some": shape.num_pairs // 2, "none": 0}[kept]
    ranks = [make_rank(count, 2, choice, rank, num_ranks) for rank, count in enumerate(tokens)]
    ranks = [rank._replace(x=rank.x.bfloat16(), grad=rank.grad.bfloat16()) for rank in ranks]
    generator = torch.Generator().manual_seed(0)
    gate_up = (torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator) / 4).to(DEVICE, torch.bfloat16)
    down = (torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator) / 4).to(DEVICE, torch.bfloat16)
    local = [slice(rank * num_local, (rank + 1) * num_local) for rank in range(num_ranks)]
    held = [(copies_of(gate_up[part]), copies_of(down[part])) for part in local]

    def show(which: str) -> None:
        for buffer, rank in zip(buffers, ranks, strict=True):
            x = rank.x if which == "token" else rank.grad
            shown, scales = getattr(buffer, f"{which}s"), getattr(buffer, f"{which}_scales")
            fp8.quantize_rows(x, out=Scaled(shown.local[: len(x)], scales.local[: len(x)]))

    def pull(which: str, number: int) -> Scaled:
        shown, scales = getattr(buffers[number], f"{which}s"), getattr(buffers[number], f"{which}_scales")
        rows = Scaled(
            *(
                part.view(torch.uint8).fill_(0x7F).view(part.dtype)
                for part in fp8.empty_rows(shape.max_rows, HIDDEN, DEVICE)
            )
        )
        return pull_scaled_rows(buffers[number], shown, scales, orders[number], rows)

    for buffer, rank in zip(buffers, ranks, strict=True):
        _, pair_rows, ends = sort_pairs(rank.ids, EXPERTS, backend="triton")
        publish_pairs(buffer, rank.ids, rank.weights, pair_rows, ends)
    show("token")
    orders = [order_rows(buffer, kept_rows=kept_rows) for buffer in buffers]
    options = dict(expected_rows=shape.num_pairs)
    pres = [
        fp8_mlp.forward_rows(
            fp8, pull("token", number), *held[number], order, kept=kept_rows, out=buffer.results.local, **options
        )
        for number, (buffer, order) in enumerate(zip(buffers, orders, strict=True))
    ]
    out = [pull_sums(b, o, len(r.x), r.weights) for b, o, r in zip(buffers, orders, ranks, strict=True)]
    show("gradient")
    gradients = [torch.zeros_like(weight) for weight in (gate_up, down)]
    for number, (buffer, order) in enumerate(zip(buffers, orders, strict=True)):
        buffer.results.local.fill_(float("nan"))
        fp8_mlp.backward_rows(
            fp8,
            pull("token", number),
            pull("gradient", number),
            pres[number],
            *held[number],
            order,
            out=buffer.results.local,
            values=buffer.values.local,
            buffers=(gradients[0][local[number]], gradients[1][local[number]]),
            **options,
        )
    x, ids, weights = (torch.cat([getattr(rank, name) for rank in ranks]) for name in ("x", "ids", "weights"))
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, weights, gate_up, down)]
    alone = routed.fp8_experts(inputs[0], ids, *inputs[1:], copies_of(gate_up), copies_of(down))
    alone.backward(torch.cat([rank.grad for rank in ranks]))
    grad_x = torch.cat([pull_sums(b, o, len(r.x)) for b, o, r in zip(buffers, orders, ranks, strict=True)])
    grad_weights = torch.cat([pull_values(b, o, len(r.x)) for b, o, r in zip(buffers, orders, ranks, strict=True)])
    for ours, theirs in zip(
        (torch.cat(out), grad_x, grad_weights, *gradients), (alone.detach(), *(i.grad for i in inputs)), strict=True
    ):
        assert (ours.double() - theirs.double()).norm() <= 0.01 * theirs.double().norm()


@pytest.mark.parametrize(
    ("kept", "in_fp8"), marked(("slow", "all", False), ("slow", "some", False), ("slow", "all", True), ("some", True))
)
def test_adapters_of_frozen_experts_get_the_gradients_of_merged_weights(kept, in_fp8) -> None:
    shape, scale = shape_of(2, 6, 3), 0.5
    buffers, ranks = make_buffers(shape), [make_rank(count, 3, "random", rank, 2) for rank, count in enumerate((6, 4))]
    kept_rows = shape.max_rows if kept == "all" else shape.num_pairs // 2
    generator = torch.Generator().manual_seed(0)
    shapes = [(2 * WIDTH, HIDDEN), (HIDDEN, WIDTH), (4, HIDDEN), (2 * WIDTH, 4), (4, WIDTH), (HIDDEN, 4)]
    gate_up, down, *adapters = ((torch.randn(EXPERTS, *s, generator=generator) / 4).to(DEVICE) for s in shapes)
    ops, local = operators_of("triton"), [slice(0, 4), slice(4, 8)]
    held: list = [(gate_up[part], down[part]) for part in local]
    if in_fp8:
        held = [tuple(quantize(weight) for weight in weights) for weights in held]
        gate_up, down = (torch.cat([plain(weights[which], torch.float32) for weights in held]) for which in (0, 1))
    factors = [ExpertAdapters(*(a[part] for a in adapters)).for_rows(torch.float32, scale) for part in local]
    rows = torch.full((2, 2, shape.max_rows, HIDDEN), float("nan"), device=DEVICE)
    gradients = [torch.zeros_like(a) for a in adapters]

    for buffer, rank in zip(buffers, ranks, strict=True):
        publish(buffer, rank)
    orders = [order_rows(buffer, kept_rows=kept_rows) for buffer in buffers]
    saved = []
    for number, (buffer, order) in enumerate(zip(buffers, orders, strict=True)):
        pull_rows(buffer, buffer.tokens, order, rows[number, 0])
        options = dict(kept=kept_rows, expected_rows=shape.num_pairs, out=buffer.results.local)
        saved.append(mlp.forward_rows(ops, rows[number, 0], *held[number], order, **options, factors=factors[number]))
    out = [pull_sums(b, o, len(r.x), r.weights) for b, o, r in zip(buffers, orders, ranks, strict=True)]
    for buffer, rank in zip(buffers, ranks, strict=True):
        buffer.results.local.fill_(float("nan"))
        buffer.gradients.local[: len(rank.x)] = rank.grad
    for number, (buffer, order) in enumerate(zip(buffers, orders, strict=True)):
        pull_rows(buffer, buffer.gradients, order, rows[number, 1])
        mlp.backward_adapted_rows(
            ops,
            *rows[number],
            *saved[number],
            *held[number],
            order,
            expected_rows=shape.num_pairs,
            out=buffer.results.local,
            values=buffer.values.local,
            factors=factors[number],
            buffers=[gradient[local[number]] for gradient in gradients],
            scale=scale,
        )
    x, ids, weights = (torch.cat([getattr(rank, name) for rank in ranks]) for name in ("x", "ids", "weights"))
    inputs = [tensor.requires_grad_() for tensor in (x, weights, *adapters)]
    merged = (gate_up + scale * adapters[1] @ adapters[0], down + scale * adapters[3] @ adapters[2])
    expected = experts_reference(x, ids, weights, *merged)
    expected.backward(torch.cat([rank.grad for rank in ranks]))
    grad_x = torch.cat([pull_sums(b, o, len(r.x)) for b, o, r in zip(buffers, orders, ranks, strict=True)])
    grad_weights = torch.cat([pull_values(b, o, len(r.x)) for b, o, r in zip(buffers, orders, ranks, strict=True)])
    for ours, theirs in zip(
        (torch.cat(out), grad_x, grad_weights, *gradients), (expected.detach(), *(i.grad for i in inputs)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_rows_lie_by_expert_then_by_rank_then_as_their_rank_sorted_them() -> None:
    # 4 experts on 2 ranks, top-2 of 2 tokens each: expert 0 and 1 on rank 0, 2 and 3 on rank 1.
    shape = shape_of(2, 2, 2, experts=4)
    buffers = make_buffers(shape)
    ids = [torch.tensor([[1, 2], [0, 1]]), torch.tensor([[3, 1], [0, 2]])]
    for buffer, chosen in zip(buffers, ids, strict=True):
        chosen = chosen.to(torch.int32).to(DEVICE)
        _, pair_rows, ends = sort_pairs(chosen, 4, backend="triton")
        publish_pairs(buffer, chosen, torch.ones(2, 2, device=DEVICE) * (1 + buffer.rank), pair_rows, ends)
    first, second = (order_rows(buffer, kept_rows=3) for buffer in buffers)
    # Rank 0, expert 0: pair 2 of rank 0, pair 2 of rank 1. Expert 1: pairs 0 and 3 of rank 0, pair 1 of rank 1.
    assert first.pair_row.tolist() == [[2, -1, 0, 3], [-1, 4, 1, -1]]
    assert (
        first.ends.tolist() == [2, 5] and first.kept_ends.tolist() == [2, 3] and first.further_ends.tolist() == [0, 2]
    )
    assert first.row_weights[:5].tolist() == [1, 2, 1, 1, 2]
    # Rank 1, expert 2: pair 1 of rank 0, pair 3 of rank 1. Expert 3: pair 0 of rank 1.
    assert second.pair_row.tolist() == [[-1, 0, -1, -1], [2, -1, -1, 1]]
    assert second.ends.tolist() == [2, 3] and second.further_ends.tolist() == [0, 0]
    rows = shape.max_rows
    assert first.slots.tolist() == [2, rows + 0, 0, 3]
    assert second.slots.tolist() == [rows + 2, 4, 1, rows + 1]


@pytest.mark.parametrize(("ranks", "top_k", "rows"), [(2, 6, 2 * 10 * 4), (4, 1, 40), (8, 3, 80)])
def test_a_rank_has_room_for_the_worst_routing(ranks, top_k, rows) -> None:
    assert shape_of(ranks, 10, top_k).max_rows == rows


def test_tensors_of_a_block_do_not_overlap_and_are_aligned() -> None:
    shape = shape_of(2, 7, 3)
    (buffers, _) = make_buffers(shape)
    spans = []
    for name in shape.fields():
        tensor = getattr(buffers, name)
        assert tensor.local.data_ptr() == tensor.addresses[0] and tensor.local.data_ptr() % 16 == 0
        spans.append((tensor.local.data_ptr(), tensor.local.data_ptr() + tensor.local.nbytes))
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    assert spans[-1][1] - spans[0][0] <= shape.num_bytes
