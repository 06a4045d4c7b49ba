"""``moescale`` with routing forced to balance, as some publish it: to time beside the natural one, never to train.

    torchrun --nproc-per-node 8 benchmarks/balanced_run.py run --plan plan.json --model MODEL --data DATA --output OUT

Token t chooses experts t * K to t * K + K - 1, modulo their number, so each gets as many tokens as any other. Their
weights are those of the router among them, and have gradients. For routing by softmax without groups.
"""

from __future__ import annotations

from typing import Any

import torch

from moescale.cli import main
from moescale.kernels.router.reference import Routing
from moescale.models.blocks import moe

ADDED = 30.0
"""To the logits of the chosen: the softmax of the others is 0 beside them, and theirs is unchanged up to a factor."""

natural_route = moe.route


def route_evenly(logits: torch.Tensor, *, top_k: int, **options: Any) -> Routing:
    num_tokens, num_experts = logits.shape
    first = torch.arange(num_tokens, device=logits.device).unsqueeze(1) * top_k
    distance = (torch.arange(num_experts, device=logits.device) - first) % num_experts
    return natural_route(logits + ADDED * (distance < top_k), top_k=top_k, **options)


if __name__ == "__main__":
    moe.route = route_evenly
    main()
