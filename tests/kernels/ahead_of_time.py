"""Compile every kernel the operators launch, for GPUs this machine does not have; run as a script.

    python ahead_of_time.py [--every-variant] CAPABILITY...      for example 80 90 100

Of every kernel the last variant that is launched, which has most of its parts, is compiled for 90, and for the others
that of a few kernels which differ most by generation; with ``--every-variant``, every one for all of them.

Operators are called on CPU tensors with the launch replaced: it records the kernel's arguments, of which the compiler
needs only types, constants and alignment. Prints one JSON object: {capability: {kernel: bytes of shared memory}}.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32", torch.int16: "i16"}
TYPES |= {torch.int8: "i8", torch.uint8: "u8", torch.float8_e4m3fn: "fp8e4nv"}
OPTIONS = ("num_warps", "num_stages")
# For their matrix units and their types.
BY_GENERATION = ("attention.forward_triton.attention_forward_kernel", "block_fp8.triton._dequantize_kernel")
Launch = tuple[JITFunction, dict[str, str], dict[tuple[int], object], dict[tuple[int], list], dict[str, int]]


def record_launches(call: Callable[[], object]) -> list[Launch]:
    """Call the operators with every kernel launch replaced by a record of its signature."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        constant = {p.name for p in kernel.params if p.is_constexpr}
        signature: dict[str, str] = {}
        constants: dict[tuple[int], object] = {}
        attributes: dict[tuple[int], list] = {}
        for position, name in enumerate(kernel.arg_names):
            value = bound[name]
            if name in constant or value is None:
                signature[name] = "constexpr"
                constants[(position,)] = value
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                attributes[(position,)] = [["tt.divisibility", 16]]
            elif isinstance(value, TensorDescriptor):
                signature[name] = f"tensordesc<{TYPES[value.base.dtype]}[{','.join(map(str, value.block_shape))}]>"
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32"
                if value % 16 == 0:
                    attributes[(position,)] = [["tt.divisibility", 16]]
        launches.append((kernel, signature, constants, attributes, options))

    original = JITFunction.run
    JITFunction.run = record  # type: ignore[method-assign]
    try:
        call()
    finally:
        JITFunction.run = original  # type: ignore[method-assign]
    return launches


def call_every_operator() -> None:
    """Each operator's kernels at the shapes of DeepSeek-Coder-V2-Lite in bf16, and its variants, the fullest last."""
    from moescale.kernels.adamw import MASTERS, MOMENT_DTYPES, AdamWHyperparameters, init_adamw_state
    from moescale.kernels.adamw import triton as adamw
    from moescale.kernels.block_fp8 import triton as block_fp8
    from moescale.kernels.cross_entropy import triton as cross_entropy
    from moescale.kernels.experts import triton as experts
    from moescale.kernels.normed_rope import triton as normed_rope
    from moescale.kernels.rms_norm import triton as rms_norm
    from moescale.kernels.rope import triton as rope
    from moescale.kernels.router import triton as router
    from moescale.kernels.swiglu import triton as swiglu
    from moescale.kernels.swiglu.reference import SwigluClamp

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    fp32, int32 = torch.float32, torch.int32
    codes = empty(2, 2816, 2048, dtype=torch.float8_e4m3fn)
    for dtype in (torch.bfloat16, fp32):
        block_fp8.dequantize(codes, empty(2, 22, 16, dtype=fp32), dtype)
    x, weight, rstd = empty(64, 2048), empty(2048), empty(64, dtype=fp32)
    for other in (None, x):
        rms_norm.forward(x, other, weight, 1e-6)
        rms_norm.backward(x, other, x, weight, rstd)
    swiglu.forward(empty(8, 5632))
    swiglu.backward(empty(8, 2816), empty(8, 5632))
    q, kv, table = empty(1, 8, 16, 192), empty(1, 8, 16, 256), empty(8, 32, dtype=fp32)
    rope.forward(q, kv, empty(1, 8, 576)[..., 512:], table, table)
    rope.backward(q, q, empty(1, 8, 16, 128), table, table)
    gain, table = empty(128), empty(8, 64, dtype=fp32)
    for heads in (empty(1, 8, 32, 128), empty(1, 8, 4, 128)):  # a tile of one token, and of several
        normed_rope.forward(heads, gain, table, table, 1e-6)
        normed_rope.backward(heads, heads, gain, table, table, 1e-6)
    # The groups of a choice, the scores (softmax, or sigmoid with a bias) and padding are constants of the kernels, and
    # every pair of two of them is here: all eight together take the compiler most of its time.
    for num_experts, groups, top_groups, sigmoid, padded in (
        (64, 1, 1, False, False),
        (64, 1, 1, True, True),
        (160, 8, 3, False, True),
        (160, 8, 3, True, False),
    ):
        normalize = groups > 1
        logits, weights = empty(64, num_experts, dtype=fp32), empty(64, 6, dtype=fp32)
        ids, counts = empty(64, 6, dtype=int32), empty(4, num_experts, dtype=int32)
        bias, mask = (empty(num_experts, dtype=fp32), empty(64, dtype=torch.bool)) if sigmoid else (None, None)
        padding = empty(64, dtype=torch.bool) if padded else None
        router.forward(logits, bias, mask, padding, 6, groups, top_groups, normalize, 1.5, 4)
        router.backward(weights, empty(dtype=fp32), logits, ids, counts, padding, normalize, 1.5, sigmoid)
    targets = torch.zeros(4, dtype=torch.int64)
    for write_gradient in (False, True):
        cross_entropy.softmax_losses(empty(4, 102400), targets, -100, write_gradient)
    cross_entropy.scaled(empty(64, 2048), empty(dtype=fp32))
    for buffer_dtype in (torch.bfloat16, fp32):
        cross_entropy.add_scaled(empty(64, 2048, dtype=buffer_dtype), empty(64, 2048), empty(dtype=fp32))
    rows, pairs, weights = empty(12, 2048), empty(12, dtype=int32), empty(2, 6, dtype=fp32)
    experts.gather_rows(empty(2, 2048), pairs, pairs, 6)
    experts.combine_rows(rows, pairs, 6, weights)
    experts.combine_rows(rows, pairs, 6)
    experts.combine_rows_backward(x, rows, pairs, weights)
    experts.sort_weights(weights, pairs)
    experts.order_by_pair(empty(12, dtype=fp32), pairs)
    ends = empty(32, dtype=int32)
    groups = experts.group_rows(ends, 12)
    for buffer, row_weights in ((None, None), (empty(32, 2048, dtype=fp32), empty(12, dtype=fp32))):
        for by_pairs in (False, True):
            experts.bias_gradient(rows, groups, row_weights, buffer=buffer, kernel="up", by_pairs=by_pairs)
    experts.add_bias_products(empty(12, dtype=fp32), rows, empty(32, 2048), groups)
    for clamp, walks in itertools.product((None, SwigluClamp(1.702, 7.0)), (False, True)):
        swiglu_backward = (empty(12, 1408), empty(12, 2816), empty(12, 2816), *(empty(12, dtype=fp32),) * 2, ends)
        constants = experts._clamp_constants(clamp) | {"WALKS": walks}
        experts._swiglu_backward_kernel[(12,)](*swiglu_backward, 32, 1408, BLOCK=512, HAS_WEIGHTS=True, **constants)
    hyperparameters = AdamWHyperparameters(
        learning_rate=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, num_updates=2
    )
    for moments in MOMENT_DTYPES:
        for master in MASTERS:
            for shape in ((8, 256), (6, 200)):
                parameter = empty(*shape)
                state = init_adamw_state(parameter, moments, master)
                adamw.update(parameter, parameter, state, hyperparameters, empty(dtype=fp32), 1, 0)


def call_attention(capability: tuple[int, int]) -> None:
    """With the launch parameters of a GPU of that capability: they go by its shared memory."""
    from moescale.kernels.attention import triton as attention

    attention._capability = lambda device: capability
    q, k, v = (
        torch.empty(1, 64, heads, width, dtype=torch.bfloat16) for heads, width in ((4, 192), (2, 192), (2, 128))
    )
    first = torch.empty(1, 64, dtype=torch.int32)
    out, sums = attention.forward(q, k, v, first, 50, q[0, 0, :, 0], 0.1)
    attention.backward(out, q, k, v, out, sums, first, first, 50, None, 0.1)


def name_of(kernel: JITFunction) -> str:
    return f"{kernel.__module__.removeprefix('moescale.kernels.')}.{kernel.__name__}"


def main() -> None:
    common = record_launches(call_every_operator)
    report: dict[str, dict[str, int]] = {}
    arguments = sys.argv[1:]
    every_variant = "--every-variant" in arguments
    for capability in (int(word) for word in arguments if word.isdecimal()):
        kernels = report.setdefault(str(capability), {})
        launches = common + record_launches(lambda: call_attention(divmod(capability, 10)))  # noqa: B023
        if not every_variant:
            last = {launch[0]: launch for launch in launches}
            launches = [launch for launch in last.values() if capability == 90 or name_of(launch[0]) in BY_GENERATION]
        for kernel, signature, constants, attributes, options in launches:
            source = ASTSource(kernel, signature, constants, attributes)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            name = name_of(kernel)
            kernels[name] = max(kernels.get(name, 0), compiled.metadata.shared)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
