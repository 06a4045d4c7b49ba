"""Compile the kernels of fp8 GEMMs for Hopper without a GPU, the GEMMs with every launch they have there.

Prints one JSON object: {kernel and what it was called with: {"shared": bytes of shared memory, "instructions": its
matrix instructions, "sums": how it sums}}. Runs in a process of its own: elsewhere in the tests, kernels are defined
for the interpreter.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import torch
import triton
from ahead_of_time import record_launches
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moescale.kernels.dispatch.buffers import ExchangeBuffers, ExchangeShape
from moescale.kernels.dispatch.triton import RowOrder, pull_scaled_rows
from moescale.kernels.fp8 import empty_copies
from moescale.kernels.fp8 import norm_triton as fp8_norm
from moescale.kernels.fp8 import triton as fp8
from moescale.kernels.fp8.gemm_triton import multiply_rows, weight_gradient
from moescale.kernels.fp8.launch_config import GRADIENTS, ROWS, TALL_GRADIENTS
from moescale.kernels.fp8.scaled import E4M3, Scaled
from moescale.kernels.rms_norm import triton as rms_norm

T, K, E, H, F = 64, 6, 64, 2048, 1408
R = T * K


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def scaled(rows: int, columns: int, num_scales: int) -> Scaled:
    return Scaled(empty(rows, columns, dtype=E4M3), empty(num_scales, dtype=torch.float32))


def call_quantising_kernels() -> None:
    pairs, ends = empty(R, dtype=torch.int32), empty(E, dtype=torch.int32)
    groups, weight = fp8.group_rows(ends, R), empty(E, H, F)
    fp8.quantize_rows(empty(T, H))
    fp8.gather_rows(empty(T, H), pairs, K)
    fp8.gather_scaled(scaled(T, H, T), pairs, K)
    for of_rows in (groups, fp8.group_rows(ends, R, R // 2)):
        fp8.swiglu(empty(R, 2 * F), of_rows)
        fp8.swiglu_backward(empty(R, F), empty(R, 2 * F), empty(R, dtype=torch.float32), of_rows)
    for width in (2 * F, 10944):
        fp8.gated_forward(empty(T, 2 * width))
        fp8.gated_backward(empty(T, width), empty(T, 2 * width))
    padded = fp8.pad_ends(ends)
    fp8.transpose_rows(scaled(R, F, R), groups, padded)
    fp8.transpose_rows(scaled(T, H, T), groups, padded, row_pair=pairs, top_k=K)
    fp8.write_copies(weight, empty(E, dtype=torch.float32), empty_copies(weight))


def call_products() -> None:
    """Of rows with both copies of a weight, of weights with every buffer."""
    ends = empty(E, dtype=torch.int32)
    groups, length = fp8.group_rows(ends, R), (R // 128 + E) * 128
    stored = Scaled(empty(E, F, H, dtype=E4M3), empty(E, dtype=torch.float32))
    multiply_rows(scaled(R, H, R), stored, groups, F, launch=ROWS)
    multiply_rows(scaled(R, H, R), scaled(F, E * H, E), groups, F, transposed=True, launch=ROWS)
    for dtype, tile in itertools.product((None, torch.bfloat16, torch.float32), (GRADIENTS, TALL_GRADIENTS)):
        buffer = None if dtype is None else empty(E, H, F, dtype=dtype)
        launch = dataclasses.replace(tile, store_splits=4) if dtype == torch.float32 else tile
        weight_gradient(scaled(H, length, E), scaled(F, length, E), ends, buffer=buffer, launch=launch)


def call_exchange() -> None:
    """Of peers' rows, with their scales."""
    shape = ExchangeShape(
        num_ranks=2, num_tokens=T, hidden_size=H, num_experts=E, top_k=K, dtype=torch.bfloat16, in_fp8=True
    )
    buffers = ExchangeBuffers.carve(shape, 0, torch.empty(shape.num_bytes, dtype=torch.uint8), [0, 0])
    pairs, experts = empty(2, R, dtype=torch.int32), empty(E, dtype=torch.int32)
    order = RowOrder(
        pair_row=pairs, row_weights=empty(R), slots=pairs, ends=experts, kept_ends=experts, further_ends=experts
    )
    assert buffers.token_scales is not None
    rows = scaled(shape.max_rows, H, shape.max_rows)
    pull_scaled_rows(buffers, buffers.tokens, buffers.token_scales, order, rows)


def call_norms() -> None:
    """That quantise and that do not, in pairs: of rows of several widths, alone, of a slice and behind a residual."""
    for width, stride, has_residual in (
        (512, 576, False),
        (512, 584, False),
        (H, H, False),
        (H, H, True),
        (7168, 7168, True),
    ):
        x, residual = empty(T, stride)[:, :width], empty(T, width) if has_residual else None
        for norm in (rms_norm, fp8_norm):
            norm.forward(x, residual, empty(width), 1e-6)


def summed_layouts(ttgir: str) -> list[str]:
    """Layouts in which the kernel sums numbers in fp32: they decide in which order."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ttgir, re.MULTILINE))
    operands = re.findall(r'"tt\.reduce".*?\}\) : \(tensor<(\w+xf32), (#\w+)>\)', ttgir, re.DOTALL)
    return [f"{shape} {layouts[layout]}" for shape, layout in operands]


def main() -> None:
    report = {}
    calls = (call_quantising_kernels, call_norms, call_products, call_exchange)
    for number, launch in enumerate(launch for call in calls for launch in record_launches(call)):
        kernel, signature, constants, attributes, options = launch
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        instructions = set(re.findall(r"wgmma\.mma_async\S+", compiled.asm["ptx"]))
        report[f"{number} {kernel.__module__}.{kernel.__name__}"] = {
            "shared": compiled.metadata.shared,
            "instructions": " ".join(sorted(instructions)),
            "sums": summed_layouts(compiled.asm["ttgir"]),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
