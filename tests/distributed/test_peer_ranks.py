"""The dispatcher that reads peers' memory, on ranks that are processes with memory shared by files.

Two layers take turns with one set of buffers, forward, backward and without a backward, in the interpreter; the barrier
of the GPUs is one of gloo. With GEMMs in fp8 ranks compute, bit for bit, what one device computes.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gloo_ranks import GlooRanks
from moescale.kernels.backends import triton_interpreted
from moescale.kernels.router import Routing

if not triton_interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

EXPERTS, HIDDEN, WIDTH, TOP_K, LAYERS = 8, 32, 16, 2, 2


def draw(number: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def drawn_layer(layer: int, tokens: int, chosen: int) -> tuple[torch.Tensor, ...]:
    """Weights, ids and routing weights of a layer; tokens choose among the first ``chosen`` experts."""
    gate_up, down = draw(layer, EXPERTS, 2 * WIDTH, HIDDEN) / 4, draw(layer + 10, EXPERTS, HIDDEN, WIDTH) / 4
    ids = draw(layer + 20, tokens, chosen).topk(TOP_K).indices.int()
    return gate_up.bfloat16(), down.bfloat16(), ids, draw(layer + 30, tokens, TOP_K).abs()


def drawn_tokens(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and the gradients of what the layers make of them."""
    return draw(40, tokens, HIDDEN).bfloat16(), draw(41, tokens, HIDDEN).bfloat16()


def on_peers(folder: Path, tokens: tuple[int, ...], chosen: int, recompute: bool, saved: float) -> list[torch.Tensor]:
    """This rank's results and gradients: of its tokens, of their routing weights, and of its experts' weights."""
    from moescale.kernels.dispatch.buffers import ExchangeBuffers, ExchangeShape
    from moescale.kernels.fp8 import copies_of
    from moescale.kernels.fp8 import triton as fp8
    from moescale.models.blocks.norm import Normed
    from moescale.runtime import peer_dispatch

    peer_dispatch.kernels_for = lambda tensor: fp8  # type: ignore[assignment]
    rank, ranks = dist.get_rank(), len(tokens)
    shape = ExchangeShape(
        num_ranks=ranks,
        num_tokens=max(tokens),
        hidden_size=HIDDEN,
        num_experts=EXPERTS,
        top_k=TOP_K,
        dtype=torch.bfloat16,
        in_fp8=True,
    )
    blocks = [
        torch.from_file(str(folder / str(number)), shared=True, size=shape.num_bytes, dtype=torch.uint8)
        for number in range(ranks)
    ]
    blocks[rank].fill_(0x7F)
    dispatcher = peer_dispatch.PeerDispatcher.__new__(peer_dispatch.PeerDispatcher)
    dispatcher._memory = SimpleNamespace(barrier=lambda channel: dist.barrier())
    dispatcher.buffers = ExchangeBuffers.carve(shape, rank, blocks[rank], [block.data_ptr() for block in blocks])
    dispatcher.num_ranks = ranks
    dispatcher.saved_rows = min(shape.max_rows, math.ceil(saved * shape.num_pairs))

    first, local = sum(tokens[:rank]), EXPERTS // ranks
    mine, own = slice(first, first + tokens[rank]), slice(rank * local, (rank + 1) * local)
    x, grad = (tensor[mine].clone() for tensor in drawn_tokens(sum(tokens)))
    hidden = x.requires_grad_()
    leaves = [x]
    for layer in range(LAYERS):
        gate_up, down, ids, weights = drawn_layer(layer, sum(tokens), chosen)
        gate_up, down, weights = (t.clone().requires_grad_() for t in (gate_up[own], down[own], weights[mine]))
        experts: Any = SimpleNamespace(
            **dict(gate_up=gate_up, down=down, gate_up_copies=copies_of(gate_up), down_copies=copies_of(down)),
            **dict(recompute_up=recompute, adapter=None, clamp=None, backend="auto", bias_gradients=None),
            **dict.fromkeys(("gate_up_bias", "down_bias", "gate_up_scale", "down_scale")),
            **dict.fromkeys(("gate_up_gradient", "down_gradient")),
        )
        counts = torch.bincount(ids.flatten(), minlength=EXPERTS).int()
        routing = Routing(ids[mine].contiguous(), weights, counts, torch.zeros(()), counts)
        with torch.no_grad():  # as a validation does, in the same buffers
            without = dispatcher(experts, hidden.detach(), routing, None)
        quantized = Normed(hidden, fp8.quantize_rows(hidden.detach()))
        hidden = dispatcher(experts, quantized, routing, None)
        assert torch.equal(without, hidden), "quantised by a norm it is not the same"
        leaves += [weights, gate_up, down]
    hidden.backward(grad)
    return [hidden.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def alone(tokens: int, chosen: int, monkeypatch) -> list[torch.Tensor]:
    """The same of one device with all experts."""
    from moescale.kernels.fp8 import copies_of, routed
    from moescale.kernels.fp8 import triton as fp8

    monkeypatch.setattr(routed, "kernels_for", lambda tensor: fp8)
    x, grad = drawn_tokens(tokens)
    hidden = x.requires_grad_()
    leaves = [x]
    for layer in range(LAYERS):
        gate_up, down, ids, weights = drawn_layer(layer, tokens, chosen)
        leaves += [t.requires_grad_() for t in (weights, gate_up, down)]
        hidden = routed.fp8_experts(hidden, ids, weights, gate_up, down, copies_of(gate_up), copies_of(down))
    hidden.backward(grad)
    return [hidden.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.fixture(scope="module")
def two_ranks():
    assert os.environ.get("TRITON_INTERPRET")
    group = GlooRanks(2)
    yield group
    group.close()


@pytest.mark.parametrize(
    ("tokens", "chosen", "recompute", "saved"),
    [
        pytest.param((6, 4), EXPERTS, False, 0.5, id="more rows than are saved"),
        pytest.param(
            (5, 0), EXPERTS // 2, True, 1.125, id="a rank without tokens and experts nobody chose, recomputed"
        ),
    ],
)
def test_ranks_that_read_each_other_compute_what_one_device_does(
    two_ranks, tokens, chosen, recompute, saved, tmp_path, monkeypatch
) -> None:
    parts = two_ranks.run(on_peers, tmp_path, tokens, chosen, recompute, saved)
    for ours, whole in zip(zip(*parts, strict=True), alone(sum(tokens), chosen, monkeypatch), strict=True):
        assert torch.equal(torch.cat(ours), whole)
