"""The Triton kernel behind :func:`moescale.kernels.adamw.adamw_update`: every state read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moescale.kernels.adamw import BLOCK, AdamWHyperparameters, AdamWState

# Rows of 128 values per program: 8 values per thread of 4 warps, so that one layout serves the 1-byte codes (8-byte
# loads) as well as fp32 (two 16-byte loads), and registers suffice for several programs per multiprocessor.
ROWS = 8

FP32, BF16, INT8 = 0, 1, 2
SEPARATE, REMAINDER, STOCHASTIC, OWN = 0, 1, 2, 3


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _bits_to_float(bits):
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _round_stochastically(x, random16):
    bits = x.to(tl.int32, bitcast=True) + random16.to(tl.int32)
    return (bits >> 16).to(tl.int16)


# The seed differs for every tensor and step: specialising on it would compile the kernel again and again.
@triton.jit(do_not_specialize=["seed_offset"])
def _adamw_kernel(
    parameter_ptr,
    gradient_ptr,
    first_ptr,
    second_ptr,
    first_scale_ptr,
    second_scale_ptr,
    master_ptr,
    gradient_scale_ptr,
    num_rows,
    num_columns,
    blocks_per_row,
    step_size,
    decay,
    beta1,
    beta2,
    eps,
    root_bias2,
    seed_offset,
    MOMENTS: tl.constexpr,
    MASTER: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    block = tl.program_id(1)
    row_mask = row < num_rows - first_row
    if WHOLE_BLOCKS:  # rows follow each other without a gap: one contiguous piece of memory per program
        index = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = row_mask[:, None] & (tl.arange(0, BLOCK)[None, :] < BLOCK)
        start = first_row * BLOCK
    else:
        column = block * BLOCK + tl.arange(0, BLOCK)
        index = row[:, None] * num_columns + column[None, :]
        mask = row_mask[:, None] & (column[None, :] < num_columns)
        start = first_row * num_columns
    parameter_ptr += start
    gradient_ptr += start
    first_ptr += start
    second_ptr += start
    master_ptr += start
    first_scale_ptr += first_row * blocks_per_row
    second_scale_ptr += first_row * blocks_per_row

    random = _mix(index.to(tl.uint32) + (start + seed_offset).to(tl.uint32))
    random_first = random & 0xFFFF
    random_second = random >> 16

    gradient = tl.load(gradient_ptr + index, mask=mask, other=0.0).to(tl.float32) * tl.load(gradient_scale_ptr)
    scale_index = row * blocks_per_row + block
    if MOMENTS == 2:
        first_scale = tl.load(first_scale_ptr + scale_index, mask=row_mask, other=0.0)
        second_scale = tl.load(second_scale_ptr + scale_index, mask=row_mask, other=0.0)
        code = tl.load(first_ptr + index, mask=mask, other=0).to(tl.float32)
        first = code * code * code * (first_scale * (1.0 / 127.0**3))[:, None]
        code = tl.load(second_ptr + index, mask=mask, other=0).to(tl.float32)
        square = code * code
        second = square * square * (second_scale * (1.0 / 255.0**4))[:, None]
    elif MOMENTS == 1:
        first = _bits_to_float(tl.load(first_ptr + index, mask=mask, other=0))
        second = _bits_to_float(tl.load(second_ptr + index, mask=mask, other=0))
    else:
        first = tl.load(first_ptr + index, mask=mask, other=0.0)
        second = tl.load(second_ptr + index, mask=mask, other=0.0)
    first += (gradient - first) * (1 - beta1)
    second += (gradient * gradient - second) * (1 - beta2)

    if MASTER == 3:
        weight = tl.load(parameter_ptr + index, mask=mask, other=0.0)
    elif MASTER == 0:
        weight = tl.load(master_ptr + index, mask=mask, other=0.0)
    else:
        bits = tl.load(parameter_ptr + index, mask=mask, other=0).to(tl.int32) << 16
        if MASTER == 1:
            bits += tl.load(master_ptr + index, mask=mask, other=0).to(tl.int32)
        weight = bits.to(tl.float32, bitcast=True)
    weight = weight * decay - step_size * first / (tl.sqrt(second) / root_bias2 + eps)

    if MASTER == 3:
        tl.store(parameter_ptr + index, weight, mask=mask)
    elif MASTER == 2:
        random_weight = _mix(random ^ 0x9E3779B9) & 0xFFFF
        tl.store(parameter_ptr + index, _round_stochastically(weight, random_weight), mask=mask)
    else:
        bits = weight.to(tl.int32, bitcast=True)
        if MASTER == 1:
            high = (bits + 0x8000) >> 16
            tl.store(master_ptr + index, (bits - (high << 16)).to(tl.int16), mask=mask)
        else:
            # The parameter is the nearest bf16, ties to even, as a cast gives it.
            high = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            tl.store(master_ptr + index, weight, mask=mask)
        tl.store(parameter_ptr + index, high.to(tl.int16), mask=mask)

    if MOMENTS == 2:
        # A code is rounded up with the chance that makes the value right on average:
        # (relative - lower) / (upper - lower).
        magnitude = tl.abs(first)  # zero outside the mask, where gradient and moment are
        scale = tl.max(magnitude, axis=1)
        tl.store(first_scale_ptr + scale_index, scale, mask=row_mask)
        relative = magnitude * (127.0**3 / tl.maximum(scale, 1e-32))[:, None]
        below = tl.minimum(tl.floor(tl.exp2(tl.log2(relative + 1e-30) * (1.0 / 3.0))), 126.0)
        square = below * below
        step = 3.0 * square + 3.0 * below + 1.0
        code = below + ((relative - square * below) * 65536.0 > random_first.to(tl.float32) * step).to(tl.float32)
        tl.store(first_ptr + index, tl.where(first < 0, -code, code).to(tl.int8), mask=mask)

        scale = tl.max(second, axis=1)
        tl.store(second_scale_ptr + scale_index, scale, mask=row_mask)
        relative = second * (255.0**4 / tl.maximum(scale, 1e-28))[:, None]
        below = tl.minimum(tl.floor(tl.sqrt(tl.sqrt(relative))), 254.0)
        square = below * below
        step = ((4.0 * below + 6.0) * below + 4.0) * below + 1.0
        code = below + ((relative - square * square) * 65536.0 > random_second.to(tl.float32) * step).to(tl.float32)
        tl.store(second_ptr + index, tl.maximum(code, 1.0).to(tl.uint8), mask=mask)
    elif MOMENTS == 1:
        tl.store(first_ptr + index, _round_stochastically(first, random_first), mask=mask)
        tl.store(second_ptr + index, _round_stochastically(second, random_second), mask=mask)
    else:
        tl.store(first_ptr + index, first, mask=mask)
        tl.store(second_ptr + index, second, mask=mask)


def update(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    state: AdamWState,
    hyperparameters: AdamWHyperparameters,
    gradient_scale: torch.Tensor,
    seed: int,
    first_index: int,
) -> None:
    """Launch one update; arguments as :func:`moescale.kernels.adamw.adamw_update` checked them."""
    h = hyperparameters
    num_columns = parameter.shape[-1] if parameter.dim() else 1
    whole_blocks = num_columns % BLOCK == 0
    if whole_blocks:  # then a block follows the other wherever a row ends
        num_columns = BLOCK
    num_rows = parameter.numel() // num_columns
    blocks_per_row = triton.cdiv(num_columns, BLOCK)
    first, second = state.first_moment, state.second_moment
    moments = {torch.float32: FP32, torch.bfloat16: BF16, torch.int8: INT8}[first.dtype]
    if moments == BF16:
        first, second = first.view(torch.int16), second.view(torch.int16)
    if parameter.dtype == torch.float32:
        kind, target, master = OWN, parameter, parameter
    else:
        # Bit patterns, not bf16 values: the kernel rounds by itself.
        target = parameter.view(torch.int16)
        if state.master is not None:
            kind, master = SEPARATE, state.master
        elif state.remainder is not None:
            kind, master = REMAINDER, state.remainder
        else:
            kind, master = STOCHASTIC, target
    _adamw_kernel[(triton.cdiv(num_rows, ROWS), blocks_per_row)](
        target,
        gradient,
        first,
        second,
        state.first_scale if state.first_scale is not None else gradient_scale,
        state.second_scale if state.second_scale is not None else gradient_scale,
        master,
        gradient_scale,
        num_rows,
        num_columns,
        blocks_per_row,
        h.learning_rate / (1 - h.beta1**h.num_updates),
        1 - h.learning_rate * h.weight_decay,
        h.beta1,
        h.beta2,
        h.eps,
        (1 - h.beta2**h.num_updates) ** 0.5,
        ((first_index + seed * 0x9E3779B1 + 2**31) & 0xFFFFFFFF) - 2**31,  # always an int32, for the same reason
        MOMENTS=moments,
        MASTER=kind,
        WHOLE_BLOCKS=whole_blocks,
        ROWS=ROWS,
        BLOCK=BLOCK,
    )
