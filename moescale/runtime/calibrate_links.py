"""Measures the links between the GPUs of one host for ``moescale calibrate``: collectives and reads of peer memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from moescale.runtime.peer_dispatch import PeerDispatcher, peers_are_readable

EXCHANGE_TOKENS, EXCHANGE_HIDDEN, EXCHANGE_TOP_K = 4096, 2048, 6
EXPERTS_PER_RANK = 32

Timer = Callable[[Callable[[], object]], float]
"""Returns the GPU seconds of one call."""


def measure_links(device: torch.device, seconds_of: Timer) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the tables ``intra_node`` and ``exchange`` of a cluster file, and a note on the source of each.

    A collective of all processes, which run on one host. With a single process ``intra_node`` is assumed. ``exchange``
    is omitted with a single process, and where GPUs cannot read each other's memory.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        assumed = {"latency_seconds": 8e-6, "bytes_per_second": 360e9}
        return {"intra_node": assumed}, {"intra_node": "assumed: NVLink 4, 450 GB/s each way, at 80%"}
    ranks = dist.get_world_size()
    tables = {"intra_node": _collectives(device, seconds_of)}
    sources = {"intra_node": f"measured over {ranks} GPUs"}
    group = dist.group.WORLD
    assert group is not None
    if peers_are_readable(group, device):
        tables["exchange"] = _exchange(group, device, seconds_of)
        sources["exchange"] = f"measured over {ranks} GPUs: the rows of {EXCHANGE_TOKENS} tokens a GPU"
    return tables, sources


def _collectives(device: torch.device, seconds_of: Timer) -> dict[str, float]:
    """Measure the latency of a small all-gather and the rate of a large one."""
    ranks = dist.get_world_size()
    seconds = {}
    for name, numel in (("small", 1024), ("large", 2**27)):
        part = torch.empty(numel, dtype=torch.uint8, device=device)
        whole = torch.empty(numel * ranks, dtype=torch.uint8, device=device)
        seconds[name] = seconds_of(lambda part=part, whole=whole: dist.all_gather_into_tensor(whole, part))  # type: ignore[misc]
    received = 2**27 * (ranks - 1)
    return {
        "latency_seconds": seconds["small"],
        "bytes_per_second": received / (seconds["large"] - seconds["small"]),
    }


def _exchange(group: dist.ProcessGroup, device: torch.device, seconds_of: Timer) -> dict[str, float]:
    """Measure the latency of a barrier, and the rate at which dispatch and combine read peers under random routing.

    The rate counts the bytes that cross the link. Its time includes the rows that a GPU reads from itself, as the cost
    model (``planner.exchange``) expects.
    """
    from moescale.kernels.dispatch import triton as exchange
    from moescale.kernels.dispatch.buffers import ExchangeShape
    from moescale.kernels.experts.sort import sort_pairs

    ranks = group.size()
    shape = ExchangeShape(
        num_ranks=ranks,
        num_tokens=EXCHANGE_TOKENS,
        hidden_size=EXCHANGE_HIDDEN,
        num_experts=EXPERTS_PER_RANK * ranks,
        top_k=EXCHANGE_TOP_K,
        dtype=torch.bfloat16,
    )
    dispatcher = PeerDispatcher(shape, group, device)
    buffers = dispatcher.buffers
    generator = torch.Generator(device).manual_seed(group.rank())
    scores = torch.rand(EXCHANGE_TOKENS, shape.num_experts, device=device, generator=generator)
    weights, ids = scores.topk(EXCHANGE_TOP_K)
    _, pair_rows, ends = sort_pairs(ids.int(), shape.num_experts)
    exchange.publish_pairs(buffers, ids.int(), weights, pair_rows, ends)
    buffers.tokens.local.zero_()
    buffers.results.local.zero_()
    dispatcher.barrier()
    order = exchange.order_rows(buffers, kept_rows=0)
    rows = buffers.results.local.new_empty((shape.max_rows, shape.hidden_size))

    def barriers() -> None:
        for _ in range(20):
            dispatcher.barrier()

    def passes() -> None:
        for _ in range(10):
            dispatcher.barrier()
            exchange.pull_rows(buffers, buffers.tokens, order, rows)
            dispatcher.barrier()
            exchange.pull_sums(buffers, order, EXCHANGE_TOKENS, weights)

    latency = seconds_of(barriers) / 20
    seconds = seconds_of(passes) / 10 - 2 * latency
    row_bytes = EXCHANGE_HIDDEN * shape.dtype.itemsize
    owners = ids // EXPERTS_PER_RANK
    others = owners != group.rank()
    combined = int(others.sum())
    pulled = EXCHANGE_TOKENS * (ranks - 1) * (1 - (1 - 1 / ranks) ** EXCHANGE_TOP_K)  # as the cost model counts them
    dispatcher.barrier()
    torch.cuda.synchronize(device)
    return {"latency_seconds": latency, "bytes_per_second": (pulled + combined) * row_bytes / seconds}
