"""Experts split over gloo ranks compute what one device computes with all of them: results and every gradient."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from gloo_ranks import GlooRanks
from moescale.kernels.backends import KernelInputError
from moescale.kernels.experts import experts
from moescale.kernels.router import Routing
from moescale.models.blocks.moe import RoutedExperts
from moescale.models.latent.model import build
from moescale.models.transformer import build_on_meta, initialize
from moescale.plan import MeshShape, one_device_plan
from moescale.runtime import expert_parallel
from moescale.runtime.expert_parallel import (
    AllToAllDispatcher,
    Exchange,
    PaddedExchange,
    SortedPairs,
    SplitExchange,
    shard_experts,
)
from tiny import tiny_config

EXPERTS, HIDDEN, WIDTH = 8, 16, 12
RELATIVE_ERROR = 1e-6  # fp32: sums over tokens run in another order
LAYERS_RELATIVE_ERROR = 1e-5  # the same, through a whole model


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
    return Routing(ids, weights, counts, torch.zeros(()), counts)


def compare(
    name: str,
    case: object,
    actual: torch.Tensor | None,
    expected: torch.Tensor | None,
    tolerance: float = RELATIVE_ERROR,
) -> None:
    assert actual is not None and expected is not None, (name, case)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, (name, case)
    if expected.numel():
        error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
        assert error <= tolerance, f"{name} of {case} is off by {error:.1e}"


def experts_layer(
    gate_up: torch.nn.Parameter, down: torch.nn.Parameter, exchange: Exchange, backend: str = "auto"
) -> RoutedExperts:
    """This rank's experts behind a dispatcher to all ranks."""
    layer = RoutedExperts(tiny_config())
    layer.gate_up, layer.down, layer.backend = gate_up, down, backend
    assert dist.group.WORLD is not None
    layer.dispatcher = AllToAllDispatcher(dist.group.WORLD, exchange)
    return layer


def check_case(
    case: Case,
    exchange_name: str,
    *,
    overlapped: bool = False,
    buffers: bool = False,
    dtype: torch.dtype = torch.float32,
    tolerance: float = RELATIVE_ERROR,
    backend: str = "auto",
) -> None:
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
    leaves = {name: leaf if name == "topk_weights" else leaf.to(dtype) for name, leaf in leaves.items()}
    ids = choose_ids(case.choice, total, case.top_k, generator)
    grad = torch.randn(total, HIDDEN, generator=generator).to(dtype)
    mine = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    own = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
    part = {"x": mine, "topk_weights": mine, "gate_up": own, "down": own}

    whole = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    expected = experts(whole["x"], ids, whole["topk_weights"], whole["gate_up"], whole["down"])
    if overlapped:
        expected = expected + whole["x"].tanh()
    expected.backward(grad)

    local = {name: torch.nn.Parameter(leaf[part[name]].clone()) for name, leaf in leaves.items()}
    exchange = SplitExchange() if exchange_name == "split" else PaddedExchange(max(tokens))
    layer = experts_layer(local["gate_up"], local["down"], exchange, backend)
    if buffers:  # which hold gradients of earlier micro-batches
        layer.gate_up_gradient = torch.full_like(local["gate_up"], 0.5).detach()
        layer.down_gradient = torch.full_like(local["down"], 0.5).detach()
    routing = make_routing(ids[mine], local["topk_weights"])
    actual = layer(local["x"], routing, (lambda: local["x"].tanh()) if overlapped else None)
    actual.backward(grad[mine])

    compare("the result", case, actual, expected[mine], tolerance)
    for name, leaf in local.items():
        reference = whole[name].grad
        assert reference is not None
        gradient = leaf.grad
        if buffers and name in ("gate_up", "down"):
            assert gradient is None
            gradient = getattr(layer, f"{name}_gradient") - 0.5
        compare(f"the gradient of {name}", case, gradient, reference[part[name]], tolerance)


def check_cases(exchange_name: str) -> None:
    for case in CASES:
        check_case(case, exchange_name)
    check_case(CASES[1], exchange_name, overlapped=True)
    check_case(CASES[1], exchange_name, buffers=True)
    # bf16 has 8 bits; one device rounds other intermediate values than two exchanges do.
    check_case(CASES[1], exchange_name, dtype=torch.bfloat16, tolerance=2**-6)


@pytest.mark.parametrize("exchange", ["split", "padded"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_compute_what_one_device_computes(ranks: int, exchange: str) -> None:
    run_ranks(ranks, check_cases, exchange)


def check_triton_cases(exchange_name: str, cases: tuple[Case, ...]) -> None:
    for case in cases:
        check_case(case, exchange_name, backend="triton")
    check_case(CASES[1], exchange_name, buffers=True, backend="triton")


@pytest.mark.parametrize(
    ("exchange", "cases"),
    [
        pytest.param("padded", (CASES[2], CASES[6]), id="padded"),
        pytest.param("padded", CASES, id="padded, all cases", marks=pytest.mark.slow),
        pytest.param("split", CASES, id="split, all cases", marks=pytest.mark.slow),
    ],
)
def test_the_gpus_operators_compute_it_too(exchange: str, cases: tuple[Case, ...]) -> None:
    """In Triton's interpreter."""
    run_ranks(2, check_triton_cases, exchange, cases)


def check_order_of_work() -> None:
    events: list[str] = []

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            events.append("overlapped")
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            events.append("overlapped")
            return grad

    depart, arrive = expert_parallel._Flight.depart, expert_parallel._Flight.arrive
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_parallel._Flight, "depart", lambda *a, **k: events.append("depart") or depart(*a, **k))
        patch.setattr(expert_parallel._Flight, "arrive", lambda *a: events.append("arrive") or arrive(*a))
        x = torch.randn(3, HIDDEN, requires_grad=True)
        weights = [torch.nn.Parameter(torch.randn(EXPERTS // 2, *shape)) for shape in ((8, HIDDEN), (HIDDEN, 4))]
        layer = experts_layer(*weights, SplitExchange())
        routing = make_routing(torch.tensor([[0], [7], [3]], dtype=torch.int32), torch.ones(3, 1))
        out = layer(x, routing, lambda: Recorded.apply(x))
        assert events == ["depart", "overlapped", "arrive", "depart", "arrive"]
        events.clear()
        out.sum().backward()
        assert events == ["depart", "arrive", "depart", "overlapped", "arrive"]


def test_overlapped_work_runs_while_rows_are_on_their_way_in_both_passes() -> None:
    run_ranks(2, check_order_of_work)


class Sharding(NamedTuple):
    """A layout of four ranks (edp is what remains), and how a weight of the local experts is divided by FSDP."""

    ep: int
    replicas: int
    experts: int
    shard_dim: int | None


SHARDINGS = (
    Sharding(ep=4, replicas=1, experts=8, shard_dim=None),
    Sharding(ep=2, replicas=1, experts=8, shard_dim=0),
    Sharding(ep=2, replicas=1, experts=6, shard_dim=1),
    Sharding(ep=2, replicas=2, experts=8, shard_dim=0),
    Sharding(ep=1, replicas=2, experts=8, shard_dim=0),
)


def check_sharding(sharding: Sharding) -> None:
    """A MoE layer with all ranks' tokens on one device, and with its experts sharded over the ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    edp = ranks // (sharding.replicas * sharding.ep)
    config = tiny_config(num_experts=sharding.experts)
    torch.manual_seed(0)
    whole, model, meta = build(config), build(config), build_on_meta(config, torch.float32)
    initialize(whole, seed=1)
    model.load_state_dict(whole.state_dict())
    model.recompute_layers = frozenset({1})
    tokens = torch.randint(config.vocab_size, (ranks, 5))

    mesh = init_device_mesh("cpu", (sharding.replicas, edp, sharding.ep), mesh_dim_names=("dp_replicate", "edp", "ep"))
    plan = one_device_plan(
        config, sequence_length=5, micro_batch_sequences=1, gradient_accumulation_steps=1, compute_dtype="fp32"
    )
    plan = dataclasses.replace(
        plan,
        plan_gpus=ranks // sharding.replicas,
        runtime_gpus=ranks,
        tokens_per_step=5 * ranks,
        dense_sharding="fsdp",
        mesh=MeshShape(dp_replicate=sharding.replicas, dp_shard=ranks // sharding.replicas, ep=sharding.ep),
    )
    for unsharded in (model, meta):
        dispatcher = AllToAllDispatcher(mesh["ep"].get_group(), SplitExchange())
        shard_experts(unsharded, plan, SimpleNamespace(experts=mesh), dispatcher=dispatcher)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in whole.named_parameters()]

    expected = whole(tokens).logits
    expected.square().sum().backward()
    actual = model(tokens[rank : rank + 1]).logits
    actual.square().sum().backward()
    compare("the logits", sharding, actual, expected[rank : rank + 1], LAYERS_RELATIVE_ERROR)
    for layer in (1, 2):
        for name in ("gate_up", "down"):
            reference = getattr(whole.layers[layer].feed_forward.experts, name).grad
            reference = reference.chunk(sharding.ep)[mesh["ep"].get_local_rank()]
            weight = getattr(model.layers[layer].feed_forward.experts, name)
            on_meta = getattr(meta.layers[layer].feed_forward.experts, name)
            gradient = weight.grad
            assert isinstance(weight, DTensor) == (sharding.shard_dim is not None), sharding
            if isinstance(weight, DTensor):
                gradient = gradient.full_tensor()
                assert weight.placements[-1] == Shard(sharding.shard_dim), sharding
                weight, on_meta = weight.to_local(), on_meta.to_local()
            assert weight.numel() * edp == reference.numel(), sharding
            assert on_meta.is_meta and on_meta.shape == weight.shape, sharding
            compare(f"the gradient of {layer}.{name}", sharding, gradient, reference, LAYERS_RELATIVE_ERROR)


def check_shardings() -> None:
    for sharding in SHARDINGS:
        check_sharding(sharding)


def test_sharded_experts_sum_the_gradients_of_all_ranks() -> None:
    run_ranks(4, check_shardings)


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
    ranks = GlooRanks(world_size)
    try:
        ranks.run(function, *args)
    finally:
        ranks.close()
