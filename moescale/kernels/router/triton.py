"""Triton kernels of :mod:`moescale.kernels.router`: scores, choice, weights, counts and balance in one pass, fp32.

Each program takes a tile of tokens of one sequence. Counts are integers, so their atomic sum is the same in any order;
the probabilities of a tile are summed into a row of their own and added up in a fixed order: results repeat exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Logits one program holds: 4 warps with 16 fp32 a thread.
TILE_ELEMENTS = 2048


@triton.jit
def _softmax(logits_ptr, rows, experts, mask, row_stride):
    logits = tl.load(logits_ptr + rows * row_stride + experts, mask=mask, other=float("-inf"))
    logits = tl.where(mask, logits, float("-inf"))
    top = tl.max(logits, axis=1, keep_dims=True)
    top = tl.where(top == float("-inf"), 0.0, top)
    exponentials = tl.exp(logits - top)
    total = tl.sum(exponentials, axis=1, keep_dims=True)
    return exponentials / tl.where(total == 0.0, 1.0, total)


@triton.jit
def _sigmoid(logits_ptr, rows, experts, mask, row_stride):
    logits = tl.load(logits_ptr + rows * row_stride + experts, mask=mask, other=float("-inf"))
    logits = tl.where(mask, logits, float("-inf"))
    exponential = tl.exp(-tl.abs(logits))  # at most 1: a large negative logit overflows nothing
    return tl.where(logits >= 0.0, 1.0, exponential) / (1.0 + exponential)


@triton.jit
def _keep_best_pairs(candidates, experts, group_size, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr):
    """Mask all but the ``TOP_GROUPS`` groups of neighbouring experts whose two best have the highest sum."""
    nothing = float("-inf")
    group = experts // group_size
    group_score = tl.zeros_like(candidates) + nothing
    for g in tl.static_range(GROUPS):
        in_group = tl.where(group == g, candidates, nothing)
        best = tl.max(in_group, axis=1, keep_dims=True)
        index = tl.argmax(in_group, axis=1, keep_dims=True)
        second = tl.max(tl.where(experts == index, nothing, in_group), axis=1, keep_dims=True)
        # A group of one expert has no second.
        score = tl.where(second == nothing, best, best + second)
        group_score = tl.where(group == g, score, group_score)
    kept = tl.zeros_like(candidates) > 1.0  # all false
    for _ in tl.static_range(TOP_GROUPS):
        is_chosen = group == tl.argmax(group_score, axis=1, keep_dims=True) // group_size
        kept = kept | is_chosen
        group_score = tl.where(is_chosen, nothing, group_score)
    return tl.where(kept, candidates, nothing)


@triton.jit
def _count_best(scores, experts, num_experts, is_token, TOP_K: tl.constexpr):
    """[1, E] int32: how many tokens have each expert among their ``TOP_K`` highest scores."""
    left = tl.where(experts < num_experts, scores, float("-inf"))
    counts = tl.zeros_like(scores).to(tl.int32)
    for _ in tl.static_range(TOP_K):
        is_index = experts == tl.argmax(left, axis=1, keep_dims=True)
        counts += (is_index & is_token).to(tl.int32)
        left = tl.where(is_index, float("-inf"), left)
    return tl.sum(counts, axis=0, keep_dims=True)


@triton.jit
def _keep_best_groups(candidates, experts, group_size, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr):
    """Mask all but the ``TOP_GROUPS`` groups of neighbouring experts with the highest maximum (ties: the first)."""
    group = experts // group_size
    group_max = tl.zeros_like(candidates) - 1.0
    for g in tl.static_range(GROUPS):
        in_group = group == g
        best = tl.max(tl.where(in_group, candidates, -1.0), axis=1, keep_dims=True)
        group_max = tl.where(in_group, best, group_max)
    kept = candidates < -2.0  # all false
    for _ in tl.static_range(TOP_GROUPS):
        chosen = tl.argmax(group_max, axis=1, keep_dims=True) // group_size
        is_chosen = group == chosen
        kept = kept | is_chosen
        group_max = tl.where(is_chosen, -2.0, group_max)
    return tl.where(kept, candidates, -1.0)


@triton.jit
def _forward_kernel(
    logits_ptr, bias_ptr, counted_ptr, padding_ptr, ids_ptr, weights_ptr, counts_ptr, rows_ptr, partial_ptr,
    num_experts, sequence_length, row_stride, group_size, scaling,
    TOP_K: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, NORMALIZE: tl.constexpr,
    SIGMOID: tl.constexpr, ALL_COUNT: tl.constexpr, PADDED: tl.constexpr,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]
    experts = tl.arange(0, EXPERTS)[None, :]
    slots = tl.arange(0, SLOTS)[None, :]
    is_token = tokens < sequence_length
    is_expert = experts < num_experts
    mask = is_token & is_expert
    rows = sequence.to(tl.int64) * sequence_length + tokens
    if SIGMOID:
        scores = _sigmoid(logits_ptr, rows, experts, mask, row_stride)
        bias = tl.load(bias_ptr + experts, mask=is_expert, other=0.0)
        candidates = tl.where(is_expert, scores + bias, float("-inf"))
        if GROUPS > 1:
            candidates = _keep_best_pairs(candidates, experts, group_size, GROUPS, TOP_GROUPS)
    else:
        scores = _softmax(logits_ptr, rows, experts, mask, row_stride)
        candidates = tl.where(is_expert, scores, -1.0)
        if GROUPS > 1:
            candidates = _keep_best_groups(candidates, experts, group_size, GROUPS, TOP_GROUPS)

    ids = tl.zeros((TOKENS, SLOTS), dtype=tl.int32)
    weights = tl.zeros((TOKENS, SLOTS), dtype=tl.float32)
    chosen = tl.zeros((TOKENS, EXPERTS), dtype=tl.int32)
    for k in tl.static_range(TOP_K):
        # NaN logits may point at the padding: an id must never lead a later kernel out of bounds.
        index = tl.minimum(tl.argmax(candidates, axis=1, keep_dims=True), num_experts - 1)
        is_index = experts == index
        ids = tl.where(slots == k, index, ids)
        if SIGMOID:
            score = tl.sum(tl.where(is_index, scores, 0.0), axis=1, keep_dims=True)
        else:
            score = tl.max(candidates, axis=1, keep_dims=True)
        weights = tl.where(slots == k, score, weights)
        chosen += (is_index & is_token).to(tl.int32)
        candidates = tl.where(is_index, float("-inf"), candidates)
    if NORMALIZE:
        weights = weights / (tl.sum(weights, axis=1, keep_dims=True) + 1e-20)
    if SIGMOID or not NORMALIZE:
        weights = weights * scaling
    slot_mask = is_token & (slots < TOP_K)
    tl.store(ids_ptr + rows * TOP_K + slots, ids, mask=slot_mask)
    tl.store(weights_ptr + rows * TOP_K + slots, weights, mask=slot_mask)

    in_tile = tl.sum(chosen, axis=0, keep_dims=True)
    if SIGMOID or PADDED:
        tl.atomic_add(rows_ptr + experts, in_tile, mask=is_expert)
    is_text = is_token
    if PADDED:
        is_text = is_token & (tl.load(padding_ptr + rows, mask=is_token, other=1) == 0)
        chosen = tl.where(is_text, chosen, 0)
        in_tile = tl.sum(chosen, axis=0, keep_dims=True)
    if ALL_COUNT:
        load = in_tile
    else:
        is_counted = tl.load(counted_ptr + rows, mask=is_token, other=0) != 0
        load = tl.sum(tl.where(is_counted, chosen, 0), axis=0, keep_dims=True)
    if SIGMOID:
        # The balance is of what the scores alone would choose.
        in_tile = _count_best(scores, experts, num_experts, is_text, TOP_K)
        scores = scores / (tl.sum(tl.where(mask, scores, 0.0), axis=1, keep_dims=True) + 1e-20)
    if SIGMOID or not ALL_COUNT:
        tl.atomic_add(rows_ptr + num_experts + experts, load, mask=is_expert)
    tl.atomic_add(counts_ptr + sequence * num_experts + experts, in_tile, mask=is_expert)
    tile = sequence * tl.num_programs(1) + tl.program_id(1)
    sums = tl.sum(tl.where(is_text, scores, 0.0), axis=0, keep_dims=True)
    tl.store(partial_ptr + tile.to(tl.int64) * num_experts + experts, sums, mask=is_expert)


@triton.jit
def _loss_weights(counts, TOP_K: tl.constexpr, PADDED: tl.constexpr):
    """What a sequence's sums of scores count: its counts [1, E]; PADDED: over the square of its tokens of text."""
    weights = counts.to(tl.float32)
    if PADDED:  # every token of text is counted TOP_K times
        num_tokens = tl.maximum(tl.sum(counts, axis=1, keep_dims=True) // TOP_K, 1).to(tl.float32)
        weights = weights / (num_tokens * num_tokens)
    return weights


@triton.jit
def _balance_kernel(
    counts_ptr, partial_ptr, rows_ptr, loss_ptr,
    num_experts, num_sequences, num_tiles, scale,
    TOP_K: tl.constexpr, PADDED: tl.constexpr, STORE_ROWS: tl.constexpr, STORE_LOAD: tl.constexpr,
    TILES: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """One program: counts over all sequences, and the auxiliary loss from the tiles' sums in a fixed order."""
    experts = tl.arange(0, EXPERTS)[None, :]
    is_expert = experts < num_experts
    total = tl.zeros((1, EXPERTS), dtype=tl.int32)
    loss = tl.zeros((1, EXPERTS), dtype=tl.float32)
    for sequence in range(num_sequences):
        sums = tl.zeros((TILES, EXPERTS), dtype=tl.float32)
        for first in range(0, num_tiles, TILES):
            tiles = first + tl.arange(0, TILES)[:, None]
            row = sequence * num_tiles + tiles
            sums += tl.load(partial_ptr + row * num_experts + experts, mask=(tiles < num_tiles) & is_expert, other=0.0)
        counts = tl.load(counts_ptr + sequence * num_experts + experts, mask=is_expert, other=0)
        total += counts
        loss += _loss_weights(counts, TOP_K, PADDED) * tl.sum(sums, axis=0, keep_dims=True)
    if STORE_ROWS:
        tl.store(rows_ptr + experts, total, mask=is_expert)
    if STORE_LOAD:
        tl.store(rows_ptr + num_experts + experts, total, mask=is_expert)
    tl.store(loss_ptr, tl.sum(loss) * scale)


@triton.jit
def _backward_kernel(
    grad_weights_ptr, grad_loss_ptr, logits_ptr, ids_ptr, counts_ptr, padding_ptr, grad_logits_ptr,
    num_experts, sequence_length, row_stride, scaling, loss_scale,
    TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, SIGMOID: tl.constexpr, PADDED: tl.constexpr,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]
    experts = tl.arange(0, EXPERTS)[None, :]
    is_token = tokens < sequence_length
    mask = is_token & (experts < num_experts)
    rows = sequence.to(tl.int64) * sequence_length + tokens
    if SIGMOID:
        scores = tl.where(mask, _sigmoid(logits_ptr, rows, experts, mask, row_stride), 0.0)
    else:
        scores = _softmax(logits_ptr, rows, experts, mask, row_stride)

    counts = tl.load(counts_ptr + sequence * num_experts + experts, mask=experts < num_experts, other=0)
    load = _loss_weights(counts, TOP_K, PADDED) * (tl.load(grad_loss_ptr) * loss_scale)
    if SIGMOID:  # the loss is of the scores divided by their sum
        total = tl.sum(scores, axis=1, keep_dims=True) + 1e-20
        grad = (load - tl.sum(load * scores, axis=1, keep_dims=True) / total) / total
    else:
        grad = tl.broadcast_to(load, (TOKENS, EXPERTS))
    if PADDED:
        is_text = tl.load(padding_ptr + rows, mask=is_token, other=1) == 0
        grad = tl.where(is_text, grad, 0.0)
    projection = tl.zeros((TOKENS, 1), dtype=tl.float32)
    chosen_sum = tl.zeros((TOKENS, 1), dtype=tl.float32) + 1e-20
    if NORMALIZE:
        for k in tl.static_range(TOP_K):
            slot = rows * TOP_K + k
            index = tl.load(ids_ptr + slot, mask=is_token, other=0)
            score = tl.sum(tl.where(experts == index, scores, 0.0), axis=1, keep_dims=True)
            projection += tl.load(grad_weights_ptr + slot, mask=is_token, other=0.0) * score
            chosen_sum += score
        projection = projection / chosen_sum
    for k in tl.static_range(TOP_K):
        slot = rows * TOP_K + k
        index = tl.load(ids_ptr + slot, mask=is_token, other=0)
        grad_weight = tl.load(grad_weights_ptr + slot, mask=is_token, other=0.0)
        if NORMALIZE:
            # Divided by itself the score of one expert is a constant; rounding would give it a gradient.
            grad_weight = (grad_weight - projection) / chosen_sum if TOP_K > 1 else tl.zeros_like(grad_weight)
        if SIGMOID or not NORMALIZE:
            grad_weight = grad_weight * scaling
        grad += tl.where(experts == index, grad_weight, 0.0)
    if SIGMOID:
        grad_logits = grad * scores * (1.0 - scores)
    else:
        grad_logits = scores * (grad - tl.sum(scores * grad, axis=1, keep_dims=True))
    tl.store(grad_logits_ptr + rows * num_experts + experts, grad_logits, mask=mask)


def _tile(num_experts: int) -> tuple[int, int]:
    """Tokens and (padded) experts of a program's tile."""
    experts = triton.next_power_of_2(num_experts)
    return max(1, TILE_ELEMENTS // experts), experts


def forward(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    counted: torch.Tensor | None,
    padding: torch.Tensor | None,
    top_k: int,
    num_groups: int,
    top_k_groups: int,
    normalize: bool,
    scaling: float,
    num_sequences: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids and weights [T, K], rows and load [2, E], the auxiliary loss, and its counts of every sequence."""
    num_tokens, num_experts = logits.shape
    length = num_tokens // num_sequences
    tokens, experts = _tile(num_experts)
    num_tiles = triton.cdiv(length, tokens)
    device = logits.device
    ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device=device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=device)
    counts = torch.zeros(num_sequences, num_experts, dtype=torch.int32, device=device)
    partial = torch.empty(num_sequences * num_tiles, num_experts, dtype=torch.float32, device=device)
    by_sigmoid, all_count, padded = bias is not None, counted is None, padding is not None
    adds_rows, adds_load = by_sigmoid or padded, by_sigmoid or not all_count
    rows = (torch.zeros if adds_rows or adds_load else torch.empty)(2, num_experts, dtype=torch.int32, device=device)
    loss = torch.empty((), dtype=torch.float32, device=device)
    if num_tokens:
        _forward_kernel[(num_sequences, num_tiles)](
            logits, bias, _as_bytes(counted), _as_bytes(padding), ids, weights, counts, rows, partial,
            num_experts, length, logits.stride(0), num_experts // num_groups, scaling,
            TOP_K=top_k, GROUPS=num_groups, TOP_GROUPS=top_k_groups, NORMALIZE=normalize,
            SIGMOID=by_sigmoid, ALL_COUNT=all_count, PADDED=padded,
            TOKENS=tokens, EXPERTS=experts, SLOTS=triton.next_power_of_2(top_k), num_warps=4,
        )  # fmt: skip
    _balance_kernel[(1,)](
        counts, partial, rows, loss,
        num_experts, num_sequences, num_tiles, loss_scale(num_tokens, num_experts, top_k, num_sequences, padded),
        TOP_K=top_k, PADDED=padded, STORE_ROWS=not adds_rows, STORE_LOAD=not adds_load,
        TILES=max(1, 4096 // experts), EXPERTS=experts, num_warps=8,
    )  # fmt: skip
    return ids, weights, rows, loss, counts


def _as_bytes(marks: torch.Tensor | None) -> torch.Tensor | None:
    return None if marks is None else marks.contiguous().view(torch.uint8)


def loss_scale(num_tokens: int, num_experts: int, top_k: int, num_sequences: int, padded: bool) -> float:
    """What ``counts * sum of probabilities``, summed over experts and sequences, is multiplied by.

    The relative load is ``counts * E * sequences / (T * K)``, the mean probability the sum times ``sequences / T``, and
    the loss the mean over sequences. Where they are padded, the kernels divide by the square of each one's own length
    in the place of ``T / sequences``.
    """
    if padded:
        return num_experts / (num_sequences * top_k)
    return num_experts * num_sequences / (max(num_tokens, 1) ** 2 * top_k)


def backward(
    grad_weights: torch.Tensor,
    grad_loss: torch.Tensor,
    logits: torch.Tensor,
    ids: torch.Tensor,
    counts: torch.Tensor,
    padding: torch.Tensor | None,
    normalize: bool,
    scaling: float,
    by_sigmoid: bool,
) -> torch.Tensor:
    """Return the gradient of the logits, [T, E] fp32."""
    num_tokens, num_experts = logits.shape
    num_sequences, top_k = counts.shape[0], ids.shape[1]
    length = num_tokens // num_sequences
    tokens, experts = _tile(num_experts)
    grad_logits = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=logits.device)
    if num_tokens:
        _backward_kernel[(num_sequences, triton.cdiv(length, tokens))](
            grad_weights.contiguous(), grad_loss, logits, ids, counts, _as_bytes(padding), grad_logits,
            num_experts, length, logits.stride(0), scaling,
            loss_scale(num_tokens, num_experts, top_k, num_sequences, padding is not None),
            TOP_K=top_k, NORMALIZE=normalize, SIGMOID=by_sigmoid, PADDED=padding is not None,
            TOKENS=tokens, EXPERTS=experts, num_warps=4,
        )  # fmt: skip
    return grad_logits
