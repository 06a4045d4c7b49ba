"""Compile the fp8 kernels of ``benchmarks/fp8`` for Hopper without a GPU, with every launch that is measured.

Prints one JSON object: {kernel: {"shared": bytes of shared memory, "instructions": its matrix instructions}}. Runs in a
process of its own: elsewhere in the tests, Triton kernels are defined for the interpreter.
"""

from __future__ import annotations

import json
import re

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

import fp8_gemm
import fp8_quantise
from fp8_measure import BLOCKS, CANDIDATES, PROMOTED
from moescale.kernels.experts.launch_config import LaunchConfig

MULTIPLES_OF_16 = {"N", "K", "M", "C", "P", "F", "H", "expert_rows", "expert_columns"}
FP8, BF16, FP32, INT32 = "*fp8e4nv", "*bf16", "*fp32", "*i32"


def compiled(kernel: JITFunction, types: dict[str, str], constants: dict, **options: int) -> dict:
    """Compile ``kernel``; arguments that are neither among ``types`` nor ``constants`` are integers."""
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in MULTIPLES_OF_16 - constants.keys()
    }
    source = ASTSource(kernel, signature, constants, attributes)
    result = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    instructions = set(re.findall(r"wgmma\.mma_async\S+", result.asm["ptx"]))
    return {"shared": result.metadata.shared, "instructions": " ".join(sorted(instructions))}


def blocks(dtype: str, *shape: int) -> str:
    return f"tensordesc<{dtype}[{','.join(map(str, shape))}]>"


def rows_kernel(launch: LaunchConfig, scaling: str, imprecise: int) -> dict:
    m, n, k = launch.block_m, launch.block_n, launch.block_k
    types = {
        "rows": blocks("fp8e4nv", 1, 1, m, k),
        "weight": blocks("fp8e4nv", n, k),
        "out": blocks("bf16", 1, 1, m, launch.store_n),
    } | {"row_scales": FP32, "weight_scales": FP32, "tiles": INT32}
    constants = tile_constants(launch) | {"FLATTEN": launch.flatten, "SCALING": scaling, "IMPRECISE": imprecise}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return compiled(fp8_gemm._rows_kernel, types, constants, **options)


def gradient_kernel(launch: LaunchConfig, imprecise: int) -> dict:
    m, n, k = launch.block_m, launch.block_n, launch.block_k
    types = {
        "left": blocks("fp8e4nv", m, k),
        "right": blocks("fp8e4nv", n, k),
        "out": blocks("bf16", 1, m, launch.store_n),
    } | {"left_scales": FP32, "right_scales": FP32, "ends": INT32}
    constants = tile_constants(launch) | {"EXPERTS": 64, "IMPRECISE": imprecise}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return compiled(fp8_gemm._weight_gradient_kernel, types, constants, **options)


def tile_constants(launch: LaunchConfig) -> dict[str, int]:
    return {
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_K": launch.block_k,
        "GROUP_M": launch.group_m,
        "NUM_PROGRAMS": 132 * launch.programs_per_sm,
        "STORE_SPLITS": launch.store_splits,
    }


def quantising_kernels() -> dict[str, dict]:
    rows = {"x": BF16, "pair_row": INT32, "tokens": FP8, "rows": FP8, "scales": FP32}
    backward = {"grad_act": BF16, "pre": BF16, "row_weights": FP32, "grad_weights": FP32, "grad_pre": FP8}
    backward |= {"grad_pre_scales": FP32, "act": FP8, "act_scales": FP32, "wide_grad_pre": BF16}
    transpose = {"rows": FP8, "row_pair": INT32, "row_scales": FP32, "expert_scales": FP32, "ends": INT32}
    transpose |= {"padded": INT32, "out": FP8}
    weight = {"weight": BF16, "largest": FP32, "rows": FP8, "columns": FP8, "scales": FP32}
    tile = {"TILE": 128, "COLUMNS": 128, "EXPERTS": 64}
    quantise = fp8_quantise
    found = {
        "swiglu": compiled(quantise._swiglu_kernel, {"pre": BF16, "act": FP8, "scales": FP32}, {"BLOCK": 2048}),
        "padded ends": compiled(
            quantise._padded_ends_kernel, {"ends": INT32, "padded": INT32}, {"PADDING": 128, "EXPERTS": 64}
        ),
        "scales of experts": compiled(
            quantise._expert_scales_kernel, {"row_scales": FP32, "ends": INT32, "scales": FP32}, {"BLOCK": 1024}
        ),
        "weight": compiled(quantise._quantise_weight_kernel, weight, {"TILE": 128}),
    }
    for top_k in (0, 6):
        found[f"rows {top_k}"] = compiled(quantise._quantise_rows_kernel, rows, {"TOP_K": top_k, "BLOCK": 2048})
        found[f"transpose {top_k}"] = compiled(quantise._transpose_kernel, transpose, tile | {"TOP_K": top_k})
    for weighted, wide in ((True, False), (False, True), (True, True)):
        constants = {"BLOCK": 2048, "HAS_WEIGHTS": weighted, "WIDE": wide}
        found[f"backward {weighted} {wide}"] = compiled(quantise._swiglu_backward_kernel, backward, constants)
    return found


def main() -> None:
    report = quantising_kernels()
    for imprecise, launches in ((0, CANDIDATES), (128, PROMOTED)):
        for tile, launch in launches.items():
            report[f"tiles of rows {tile} {imprecise}"] = rows_kernel(launch, "row", imprecise)
            report[f"tiles of weights {tile} {imprecise}"] = gradient_kernel(launch, imprecise)
    for tile, launch in BLOCKS.items():
        report[f"tiles in blocks {tile}"] = rows_kernel(launch, "block", 0)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
