"""Greedy decoding: continue a prompt with the most likely token, one at a time, with a key/value cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from moescale.models.cache import KeyValueCache
from moescale.models.transformer import Transformer


@torch.no_grad()
def decode_greedily(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    end_tokens: Collection[int] = (),
    agree: Callable[[int], int] = lambda token: token,
) -> list[int]:
    """Return at most ``max_tokens`` tokens that follow ``prompt``; the last one may be one of ``end_tokens``.

    Of equal logits the first one counts. Where the model is sharded or its experts are on several ranks, all ranks call
    this with the same prompt, and ``agree`` gives every rank the first one's choice, so that rounding cannot part them.
    """
    assert prompt, "decoding starts after at least one token"
    device = next(model.parameters()).device
    cache = KeyValueCache(model.config.num_layers, len(prompt) + max_tokens)
    tokens: list[int] = []
    unread = list(prompt)
    while len(tokens) < max_tokens:
        output = model(torch.tensor([unread], device=device), cache=cache)
        token = agree(int(output.logits[0, -1].argmax()))
        tokens.append(token)
        if token in end_tokens:
            break
        unread = [token]
    return tokens
