"""Experts split over gloo ranks compute what one device computes with all of them: results and every gradient."""

from __future__ import annotations

import os
import tempfile
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from moescale.kernels.backends import KernelInputError
from moescale.kernels.experts import experts
from moescale.kernels.router import Routing
from moescale.model.transformer import Transformer
from moescale.plan import LayerPlan, MeshShape
from moescale.runtime.expert_parallel import (
    ExpertParallel,
    PaddedExchange,
    SortedPairs,
    SplitExchange,
    shard_experts,
)
from tiny import tiny_config

EXPERTS, HIDDEN, WIDTH = 8, 16, 12
RELATIVE_ERROR = 1e-6  # fp32: sums over tokens run in another order


class Case(NamedTuple):
    """Routing of one test: how the ids are chosen, K, and the tokens of ranks 0, 1, 2, 3."""

    choice: str
    top_k: int
    tokens: tuple[int, int, int, int]


CASES = (
    Case("random", 1, (7, 7, 7, 7)),
    Case("random", 6, (9, 4, 1, 13)),
    Case("random", 2, (5, 0, 3, 0)),
    Case("first experts", 1, (6, 11, 2, 5)),
    Case("first experts", 6, (6, 11, 2, 5)),
    Case("last experts", 1, (0, 8, 3, 4)),
    Case("some pairs nowhere", 2, (10, 6, 4, 8)),
)


def choose_ids(choice: str, num_tokens: int, top_k: int, generator: torch.Generator) -> torch.Tensor:
    ids = torch.rand(num_tokens, EXPERTS, generator=generator).topk(top_k).indices
    if choice == "first experts":
        ids = torch.arange(top_k).expand(num_tokens, top_k)
    elif choice == "last experts":
        ids = torch.arange(EXPERTS - top_k, EXPERTS).expand(num_tokens, top_k)
    elif choice == "some pairs nowhere":
        ids = ids.masked_fill(ids % 3 == 0, -1)
    return ids.to(torch.int32).contiguous()


def make_routing(ids: torch.Tensor, weights: torch.Tensor) -> Routing:
    counts = torch.bincount(ids[ids >= 0], minlength=EXPERTS).to(torch.int32)
    return Routing(ids, weights, counts, torch.zeros(()))


def compare(name: str, case: object, actual: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    assert actual is not None and expected is not None, (name, case)
    assert actual.shape == expected.shape, (name, case)
    if expected.numel():
        error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
        assert error <= RELATIVE_ERROR, f"{name} of {case} is off by {error:.1e}"


def check_case(case: Case, exchange_name: str, *, beside: bool = False) -> None:
    """On every rank: the whole problem on one device, then this rank's part of it."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(3)
    tokens = case.tokens[:ranks]
    total = sum(tokens)
    leaves = {
        "x": torch.randn(total, HIDDEN, generator=generator),
        "topk_weights": torch.rand(total, case.top_k, generator=generator),
        "gate_up": torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator) * 0.3,
        "down": torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator) * 0.3,
    }
    ids = choose_ids(case.choice, total, case.top_k, generator)
    grad = torch.randn(total, HIDDEN, generator=generator)
    mine = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    own = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
    part = {"x": mine, "topk_weights": mine, "gate_up": own, "down": own}

    whole = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    expected = experts(whole["x"], ids, whole["topk_weights"], whole["gate_up"], whole["down"])
    if beside:
        expected = expected + whole["x"].tanh()
    expected.backward(grad)

    local = {name: torch.nn.Parameter(leaf[part[name]].clone()) for name, leaf in leaves.items()}
    exchange = SplitExchange() if exchange_name == "split" else PaddedExchange(max(tokens))
    layer = ExpertParallel(local["gate_up"], local["down"], group=dist.group.WORLD, exchange=exchange)
    routing = make_routing(ids[mine], local["topk_weights"])
    actual = layer(local["x"], routing, (lambda: local["x"].tanh()) if beside else None)
    actual.backward(grad[mine])

    compare("the result", case, actual, expected[mine])
    for name, leaf in local.items():
        reference = whole[name].grad
        assert reference is not None
        compare(f"the gradient of {name}", case, leaf.grad, reference[part[name]])


def check_cases(exchange_name: str) -> None:
    for case in CASES:
        check_case(case, exchange_name)
    check_case(CASES[1], exchange_name, beside=True)


@pytest.mark.parametrize("exchange", ["split", "padded"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_compute_what_one_device_computes(ranks: int, exchange: str) -> None:
    run_ranks(ranks, check_cases, exchange)


def check_sharded_model(shape: MeshShape, replicas: int) -> None:
    """Feed-forward of a MoE layer with all ranks' tokens on one device, and sharded by the mesh."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    edp = ranks // (replicas * shape.ep)
    torch.manual_seed(0)
    whole, model = Transformer(tiny_config()), Transformer(tiny_config())
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.load_state_dict(whole.state_dict())
    names = {name for name, _ in model.named_parameters()}
    x = torch.randn(ranks, 5, 32)
    grad = torch.randn(ranks, 5, 32)

    mesh = init_device_mesh("cpu", (replicas, edp, shape.ep), mesh_dim_names=("dp_replicate", "edp", "ep"))
    plan = SimpleNamespace(mesh=shape, moe_layers=LayerPlan())
    shard_experts(model, plan, SimpleNamespace(experts=mesh))
    assert {name for name, _ in model.named_parameters()} == names

    expected = whole.layers[1].feed_forward(x).hidden
    expected.backward(grad)
    actual = model.layers[1].feed_forward(x[rank : rank + 1]).hidden
    actual.backward(grad[rank : rank + 1])
    compare("the result", shape, actual, expected[rank : rank + 1])
    coordinate = mesh["ep"].get_local_rank()
    for name in ("gate_up", "down"):
        reference = getattr(whole.layers[1].feed_forward.experts, name).grad.chunk(shape.ep)[coordinate]
        weight = getattr(model.layers[1].feed_forward.experts, name)
        assert isinstance(weight, DTensor) == (edp * replicas > 1)
        gradient = weight.grad.full_tensor() if isinstance(weight, DTensor) else weight.grad
        compare(f"the gradient of {name}", shape, gradient, reference)
        if edp > 1:
            assert weight.to_local().numel() * edp == reference.numel()


@pytest.mark.parametrize(
    ("ep", "replicas"),
    [(4, 1), (2, 1), (2, 2), (1, 2)],
    ids=["experts only", "sharded experts", "replicated experts", "sharded and replicated experts"],
)
def test_sharded_experts_sum_the_gradients_of_all_ranks(ep: int, replicas: int) -> None:
    shape = MeshShape(dp_replicate=replicas, dp_shard=4 // replicas, ep=ep)
    run_ranks(4, check_sharded_model, shape, replicas)


def sorted_pairs(num_tokens: int) -> SortedPairs:
    pairs = num_tokens * 2
    return SortedPairs(
        row_pair=torch.arange(pairs, dtype=torch.int32),
        pair_row=torch.arange(pairs, dtype=torch.int32),
        sent=torch.full((2, 4), pairs // 8, dtype=torch.int32),
        received=torch.full((2, 4), pairs // 8, dtype=torch.int32),
        top_k=2,
    )


def test_padded_exchange_reads_nothing_on_the_host() -> None:
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with FakeTensorMode():
        PaddedExchange(8).lay_out(sorted_pairs(8))
        with pytest.raises(DataDependentOutputException):
            SplitExchange().lay_out(sorted_pairs(8))


def test_padded_exchange_refuses_more_tokens_than_it_has_room_for() -> None:
    with pytest.raises(KernelInputError, match=r"8 tokens are more than max_tokens \(7\)"):
        PaddedExchange(7).lay_out(sorted_pairs(8))


def run_ranks(world_size, function, *args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter, (world_size, os.path.join(folder, "store"), function, args), nprocs=world_size)


def _enter(rank, world_size, path, function, args) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
    function(*args)
    dist.destroy_process_group()
