"""The grouped GEMM kernels compile for Ampere, Hopper and Blackwell without a GPU, with each one's matrix units.

They are compiled in a process of their own, one for all: elsewhere in the tests, Triton kernels are defined for the
interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

PROGRAM = """
import json, sys, traceback
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
import torch
from moescale.kernels.experts import grouped_gemm_triton
from moescale.kernels.experts import triton as experts_triton
from unittest import mock
from moescale.kernels.experts.launch_config import (
    LOW_RANK_KERNELS, RANK_BLOCK, default_launch, low_rank_launch, with_bias, with_low_rank
)

def blocks(*shape):
    return f"tensordesc<bf16[{','.join(map(str, shape))}]>"

def compile_kernel(kernel, capability, rank):
    for cached in (with_low_rank, with_bias):  # of one GPU, where a process has one
        cached.cache_clear()
    has_bias = kernel.endswith("_biased")
    kernel = kernel.removesuffix("_biased")
    launch = default_launch((capability // 10, capability % 10), torch.bfloat16)
    depth = RANK_BLOCK
    if kernel in LOW_RANK_KERNELS:
        launch = low_rank_launch(kernel, (capability // 10, capability % 10), torch.bfloat16, rank, rank)
        rank = 0
    elif rank:
        with mock.patch("torch.cuda.get_device_capability", lambda device: (capability // 10, capability % 10)):
            launch, depth = with_low_rank(launch, torch.device("cuda"), rank)
    if has_bias:
        with mock.patch("torch.cuda.get_device_capability", lambda device: (capability // 10, capability % 10)):
            launch = with_bias(launch, torch.device("cuda"))
    m, n, k, store = launch.block_m, launch.block_n, launch.block_k, launch.store_n
    tiles = dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=1, NUM_PROGRAMS=132, STORE_SPLITS=launch.store_splits)
    constants = dict(**tiles, PRECISION="tf32")
    rows = dict(rows=blocks(1, 1, m, k), half_rows=blocks(1, 1, m // 2, k), tiles="*i32",
                projected=blocks(1, 1, m, depth), half_projected=blocks(1, 1, m // 2, depth))
    if kernel == "up":
        function = experts_triton._up_kernel
        types = rows | dict(gate_up=blocks(1, 2, n // 2, k), factor=blocks(1, 2, n // 2, depth),
                            pre=blocks(1, 1, m, 1, store // 2), half_pre=blocks(1, 1, m // 2, 1, store // 2),
                            act=blocks(1, 1, m, store // 2), half_act=blocks(1, 1, m // 2, store // 2))
        constants |= dict(WRITE_PRE=True, WRITE_ACT=True, FLATTEN=launch.flatten, HALF_TILES=True, RANK=rank,
                          RANK_BLOCK=depth)
        constants |= dict(ALPHA=1.702, LIMIT=7.0) if has_bias else dict(ALPHA=None, LIMIT=None)
    elif kernel.endswith("wgrad"):
        function = grouped_gemm_triton._weight_gradient_kernel
        types = dict(left=blocks(1, 1, k, m), right=blocks(1, 1, k, n), out=blocks(1, m, store), ends="*i32")
        constants |= dict(EXPERTS=64, ACCUMULATE="reduce")
    else:
        function = grouped_gemm_triton._rows_kernel
        transposed = kernel == "up_dgrad"
        types = rows | dict(weight=blocks(1, k, n) if transposed else blocks(1, n, k), out=blocks(1, 1, m, store),
                            half_out=blocks(1, 1, m // 2, n // ((launch.store_splits + 1) // 2)), out_pointer="*bf16",
                            factor=blocks(1, depth, n) if transposed else blocks(1, n, depth))
        constants |= dict(TRANSPOSED=transposed, FLATTEN=launch.flatten, HALF_TILES=True, ZERO_TAIL=True, RANK=rank,
                          RANK_BLOCK=depth)
    if has_bias:
        types["bias"] = "*bf16"
    else:
        constants["bias"] = None
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in function.arg_names}
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    instructions = [name for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma") if name in ptx]
    return {"instructions": instructions, "shared": compiled.metadata.shared}

for line in sys.stdin:
    try:
        answer = compile_kernel(*json.loads(line))
    except Exception:
        answer = {"error": traceback.format_exc()}
    print(json.dumps(answer), flush=True)
"""

GENERATIONS = [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)]
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.fixture(scope="module")
def compiler() -> Iterator[subprocess.Popen]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.communicate()  # it ends with its input


def compile_apart(compiler, kernel, capability, rank):
    compiler.stdin.write(json.dumps([kernel, capability, rank]) + "\n")
    compiler.stdin.flush()
    answer = compiler.stdout.readline()
    assert answer, f"the compiler's process ended with status {compiler.wait()}"
    result = json.loads(answer)
    assert "error" not in result, result["error"]
    assert MATRIX_INSTRUCTION[capability] in result["instructions"]
    assert result["shared"] <= SHARED_MEMORY[capability]


@pytest.mark.parametrize("capability", GENERATIONS)
@pytest.mark.parametrize(
    "kernel",
    # Those in the ordinary tests have one with a bias or a low rank below.
    [pytest.param("up", marks=pytest.mark.slow), "down", pytest.param("up_dgrad", marks=pytest.mark.slow), "up_wgrad"],
)
def test_kernel_compiles_to_the_matrix_units_of_its_generation(compiler, kernel, capability):
    compile_apart(compiler, kernel, capability, rank=0)


@pytest.mark.parametrize("capability", GENERATIONS)
@pytest.mark.parametrize("kernel", [pytest.param("up", marks=pytest.mark.slow), "up_dgrad"])
def test_kernel_with_a_low_rank_addition_fits_next_to_its_pipeline(compiler, kernel, capability):
    compile_apart(compiler, kernel, capability, rank=32)


@pytest.mark.parametrize("capability", GENERATIONS)
@pytest.mark.parametrize("kernel", ["up_biased", pytest.param("down_biased", marks=pytest.mark.slow)])
def test_kernel_with_biases_and_the_clamped_activation_compiles(compiler, kernel, capability):
    compile_apart(compiler, kernel, capability, rank=0)


@pytest.mark.slow
@pytest.mark.parametrize("capability", MATRIX_INSTRUCTION)
@pytest.mark.parametrize("kernel", ["project", "factor_wgrad", "projection_wgrad"])
def test_gemms_onto_a_rank_compile(compiler, kernel, capability):
    compile_apart(compiler, kernel, capability, rank=16)
