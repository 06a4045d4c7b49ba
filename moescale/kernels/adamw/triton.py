"""The Triton kernel behind :func:`moescale.kernels.adamw.adamw_update`: every state read and written once.

With 8-bit moments the instructions count: a GPU that moves 4 TB/s has about a hundred for the 14 bytes of a weight, and
this takes 84. So what is the same for a row is folded into one factor, quotients and logarithms are the hardware's
approximations, and codes become numbers, and numbers codes, by an addition: the low byte of the float 2^23 + n is n.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from moescale.kernels.adamw.state import BLOCK, AdamWHyperparameters, AdamWState
from moescale.kernels.backends import triton_interpreted

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


@triton.jit
def _load(pointer, mask, MASKED: tl.constexpr):
    # Zero outside the mask; without one, no register has to be set to zero first.
    if MASKED:
        return tl.load(pointer, mask=mask, other=0)
    else:
        return tl.load(pointer)


@triton.jit
def _divide(a, b, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        return libdevice.fast_dividef(a, b)
    else:
        return a / b


@triton.jit
def _cube_root(x, APPROXIMATE: tl.constexpr):
    """The cube root of x >= 0, too small by a few millionths, so that that of n^3 is never above n."""
    if APPROXIMATE:
        log = libdevice.fast_log2f(x)  # -inf for 0, whose exp2 is 0 again
    else:
        log = tl.log2(tl.maximum(x, 1e-30))
    return tl.exp2(log * (1.0 / 3.0) - 6e-6)


@triton.jit
def _low_bits(x):
    """The integer 2^23 + n of a float 2^23 + n, 0 <= n < 2^22; of 1.5 * 2^23 + n with -2^22 <= n < 2^22 too."""
    return x.to(tl.int32, bitcast=True)


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
    MASKED: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    block = tl.program_id(1)
    if WHOLE_BLOCKS:  # rows follow each other without a gap: one contiguous piece of memory per program
        index = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        start = first_row * BLOCK
    else:
        column = block * BLOCK + tl.arange(0, BLOCK)
        index = row[:, None] * num_columns + column[None, :]
        start = first_row * num_columns
    if MASKED:
        row_mask = row < num_rows - first_row
        columns_left = BLOCK if WHOLE_BLOCKS else num_columns - block * BLOCK
        mask = row_mask[:, None] & (tl.arange(0, BLOCK)[None, :] < columns_left)
    else:
        row_mask = None
        mask = None
    parameter_ptr += start
    gradient_ptr += start
    first_ptr += start
    second_ptr += start
    master_ptr += start
    first_scale_ptr += first_row * blocks_per_row
    second_scale_ptr += first_row * blocks_per_row

    gradient = _load(gradient_ptr + index, mask, MASKED)
    first = _load(first_ptr + index, mask, MASKED)
    second = _load(second_ptr + index, mask, MASKED)
    if MASTER == 0:
        weight = _load(master_ptr + index, mask, MASKED)
    else:
        weight = _load(parameter_ptr + index, mask, MASKED)
    if MASTER == 1:
        remainder = _load(master_ptr + index, mask, MASKED)
    scale_index = row * blocks_per_row + block
    if MOMENTS == 2:
        first_scale = _load(first_scale_ptr + scale_index, row_mask, MASKED)
        second_scale = _load(second_scale_ptr + scale_index, row_mask, MASKED)
    gradient_scale = tl.load(gradient_scale_ptr)
    random = _mix(index.to(tl.uint32) + (start + seed_offset).to(tl.uint32))

    gradient = gradient.to(tl.float32)
    if MOMENTS == 2:
        code = first.to(tl.float32)
        first = (code * code) * (code * (first_scale * (beta1 / 127.0**3))[:, None])
        first += gradient * (gradient_scale * (1 - beta1))
        code = (second.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
        square = code * code
        gradient *= gradient_scale * tl.sqrt(1 - beta2)
        second = square * (square * (second_scale * (beta2 / 255.0**4))[:, None]) + gradient * gradient
    else:
        if MOMENTS == 1:
            first = _bits_to_float(first)
            second = _bits_to_float(second)
        gradient *= gradient_scale
        first += (gradient - first) * (1 - beta1)
        second += (gradient * gradient - second) * (1 - beta2)

    if MASTER == 1:
        # (weight << 16) + remainder, in fewer instructions: the sign is extended where the remainder has its place.
        bits = (((weight.to(tl.int32) << 16) | (remainder.to(tl.int32) & 0xFFFF)) ^ 0x8000) - 0x8000
        weight = bits.to(tl.float32, bitcast=True)
    elif MASTER == 2:
        weight = _bits_to_float(weight)
    root = tl.sqrt(second)
    update = _divide(first * (step_size * root_bias2), root + eps * root_bias2, APPROXIMATE)
    weight = weight * decay - update

    if MASTER == 3:
        tl.store(parameter_ptr + index, weight, mask=mask)
    elif MASTER == 2:
        random_weight = _mix(random ^ 0x9E3779B9) & 0xFFFF
        tl.store(parameter_ptr + index, _round_stochastically(weight, random_weight), mask=mask)
    else:
        bits = weight.to(tl.int32, bitcast=True)
        if MASTER == 1:
            high = (bits + 0x8000) >> 16
            tl.store(master_ptr + index, bits.to(tl.int16), mask=mask)  # bits - (high << 16), in 16 bits
        else:
            # The parameter is the nearest bf16, ties to even, as a cast gives it.
            high = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            tl.store(master_ptr + index, weight, mask=mask)
        tl.store(parameter_ptr + index, high.to(tl.int16), mask=mask)

    if MOMENTS == 2:
        # A code is rounded up with the chance that makes the value right on average:
        # (relative - lower) / (upper - lower).
        magnitude = tl.abs(first)  # zero outside the mask, where gradient and moment are
        largest = tl.max(magnitude, axis=1)
        tl.store(first_scale_ptr + scale_index, largest, mask=row_mask)
        relative = magnitude * _divide(127.0**3, tl.maximum(largest, 1e-32), APPROXIMATE)[:, None]
        below = tl.floor(_cube_root(relative, APPROXIMATE))
        square = below * below
        step = (square + below) * (3.0 / 2**16) + 1.0 / 2**16
        code = below + (relative - square * below > (random & 0xFFFF).to(tl.float32) * step).to(tl.float32)
        code = (first.to(tl.int32, bitcast=True) & -(2**31)) | code.to(tl.int32, bitcast=True)  # with the sign of first
        tl.store(first_ptr + index, _low_bits(code.to(tl.float32, bitcast=True) + 12582912.0).to(tl.int8), mask=mask)

        largest = tl.max(second, axis=1)
        tl.store(second_scale_ptr + scale_index, largest, mask=row_mask)
        factor = _divide(255.0**4, tl.maximum(largest, 1e-28), APPROXIMATE)
        relative = second * factor[:, None]
        # Too small by two millionths, like the cube root, so that the largest is rounded up to 255, not to 256.
        below = tl.floor(tl.sqrt(root * (tl.sqrt(factor) * (1 - 4e-6))[:, None]))
        square = below * below
        step = ((below * (4.0 / 2**32) + 6.0 / 2**32) * below + 4.0 / 2**32) * below + 1.0 / 2**32
        code = below + (relative - square * square > random.to(tl.float32) * step).to(tl.float32)
        tl.store(second_ptr + index, _low_bits(tl.maximum(code, 1.0) + 8388608.0).to(tl.uint8), mask=mask)
    elif MOMENTS == 1:
        tl.store(first_ptr + index, _round_stochastically(first, random & 0xFFFF), mask=mask)
        tl.store(second_ptr + index, _round_stochastically(second, random >> 16), mask=mask)
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
        MASKED=not whole_blocks or num_rows % ROWS != 0,
        APPROXIMATE=not triton_interpreted(),
        ROWS=ROWS,
        BLOCK=BLOCK,
    )
