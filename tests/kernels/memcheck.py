"""Every operator once on small, awkward shapes, forward and backward: what compute-sanitizer's memcheck watches.

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/kernels/memcheck.py [experts adamw ...]

Row counts around the tile edges, empty experts, one token, sizes that fill no tile. Results are judged by the tests.
"""

from __future__ import annotations

import itertools
import os
import sys

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # every tensor its own allocation, so that its end is an end

import torch

from moescale.kernels.adamw import MASTERS, MOMENT_DTYPES, AdamWHyperparameters, adamw_update, init_adamw_state
from moescale.kernels.attention import Documents, attention
from moescale.kernels.cross_entropy import linear_cross_entropy
from moescale.kernels.experts import experts
from moescale.kernels.fp8 import copies_of, kernels_for
from moescale.kernels.fp8.linear import fp8_linear
from moescale.kernels.fp8.mlp import fp8_mlp
from moescale.kernels.fp8.norm import quantizing_rms_norm
from moescale.kernels.fp8.routed import fp8_experts
from moescale.kernels.fp8.rows import fp8_expert_mlp
from moescale.kernels.normed_rope import normed_half_rope
from moescale.kernels.rms_norm import add_rms_norm, rms_norm
from moescale.kernels.rope import mla_rope
from moescale.kernels.router import route, router_logits
from moescale.kernels.swiglu import swiglu


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype).requires_grad_()


def backward(*results: torch.Tensor) -> None:
    sum((result.float().sum() for result in results), torch.zeros((), device="cuda")).backward()


def check_experts() -> None:
    for tokens, top_k, num_experts in ((1, 1, 1), (5, 2, 7), (127, 1, 4), (129, 2, 4), (300, 8, 64)):
        for hidden, ffn in ((64, 24), (72, 264)):
            chosen_among = max(top_k, num_experts - 1)  # the last expert stays empty where it can
            ids = torch.rand(tokens, chosen_among, device="cuda").topk(top_k).indices.int()
            weights = randn(tokens, top_k, dtype=torch.float32)
            backward(experts(randn(tokens, hidden), ids, weights, randn(num_experts, 2 * ffn, hidden),
                             randn(num_experts, hidden, ffn), backend="triton"))  # fmt: skip


def check_fp8() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        print("check_fp8 needs a Hopper GPU")
        return
    for tokens, top_k, num_experts in ((1, 1, 1), (5, 2, 7), (127, 1, 4), (129, 2, 4), (300, 8, 64)):
        for hidden, ffn in ((64, 16), (144, 272)):
            ids = torch.rand(tokens, max(top_k, num_experts - 1), device="cuda").topk(top_k).indices.int()
            ids[::5, 0] = -1
            weights = randn(num_experts, 2 * ffn, hidden), randn(num_experts, hidden, ffn)
            copies = tuple(copies_of(weight) for weight in weights)
            for dtype in (None, torch.bfloat16, torch.float32):
                buffers = [None if dtype is None else torch.zeros_like(w, dtype=dtype) for w in weights]
                x, of_pairs = randn(tokens, hidden), randn(tokens, top_k, dtype=torch.float32)
                for quantized in (None, kernels_for(x).quantize_rows(x.detach())):
                    backward(fp8_experts(x, ids, of_pairs, *weights, *copies, gate_up_gradient=buffers[0],
                                         down_gradient=buffers[1], recompute_up=dtype is None,
                                         quantized=quantized))  # fmt: skip
                ends = torch.randint(0, 40, (num_experts,), device="cuda").cumsum(0).int()
                rows = randn(int(ends[-1]) + 5, hidden)  # the last of no expert
                backward(fp8_expert_mlp(rows, *weights, ends, gate_up_copies=copies[0], down_copies=copies[1],
                                        gate_up_gradient=buffers[0], down_gradient=buffers[1]))  # fmt: skip
    for tokens, hidden, width in ((1, 16, 16), (37, 144, 80), (300, 2048, 576)):
        linear_weight = randn(width, hidden)
        for residual in (None, randn(tokens, hidden)):
            normed, _, rows = quantizing_rms_norm(randn(tokens, hidden), residual, randn(hidden), 1e-6)
            for quantized in (None, rows):
                backward(fp8_linear(normed.detach().requires_grad_(), linear_weight, copies_of(linear_weight),
                                    randn(width), quantized=quantized))  # fmt: skip
            backward(normed)
    for tokens, hidden, ffn in ((1, 16, 16), (37, 144, 80), (130, 64, 528), (65, 32, 4112)):
        mlp_weights = randn(2 * ffn, hidden), randn(hidden, ffn)
        backward(fp8_mlp(randn(tokens, hidden), *mlp_weights, *(copies_of(weight) for weight in mlp_weights)))


def check_router() -> None:
    for tokens, num_experts, top_k, groups in ((1, 8, 2, 1), (33, 64, 6, 1), (130, 160, 6, 8)):
        marks = torch.ones(tokens, dtype=torch.bool, device="cuda")
        biases = (None, torch.zeros(num_experts, device="cuda"))
        for bias, padding in itertools.product(biases, (None, marks, ~marks)):
            logits = router_logits(randn(tokens, 64), randn(num_experts, 64))
            routing = route(
                logits,
                bias=bias,
                counted=None if bias is None else marks,
                padding=padding,
                top_k=top_k,
                group_limited=groups > 1,
                num_groups=groups,
                top_k_groups=min(3, groups),
                normalize_topk=False,
                routed_scaling_factor=1.0,
                num_sequences=1,
                backend="triton",
            )
            backward(routing.topk_weights, routing.aux_loss)


def check_attention() -> None:
    for length, widths, window, dtype in (
        (1, (64, 64), None, torch.bfloat16),
        (65, (192, 128), 20, torch.bfloat16),
        (130, (256, 256), None, torch.bfloat16),
        (200, (48, 16), 70, torch.float32),
    ):
        starts = torch.zeros(2, length, dtype=torch.bool)
        starts[0, ::37] = True
        documents = Documents.from_starts(starts, torch.device("cuda"))
        q, k = randn(2, length, 4, widths[0], dtype=dtype), randn(2, length, 2, widths[0], dtype=dtype)
        v, sinks = randn(2, length, 2, widths[1], dtype=dtype), randn(4, dtype=dtype)
        for asked in (documents, None):
            backward(
                attention(q, k, v, softmax_scale=0.1, documents=asked, window=window, sinks=sinks, backend="triton")
            )


def check_elementwise() -> None:
    for rows, width in ((1, 8), (37, 72), (130, 2048)):
        backward(rms_norm(randn(rows, width), randn(width), 1e-6, backend="triton"))
        backward(*add_rms_norm(randn(rows, width), randn(rows, width), randn(width), 1e-6, backend="triton"))
        backward(swiglu(randn(rows, 2 * width), backend="triton"))
    for batch, length, heads, nope, rope, value in ((1, 3, 1, 16, 8, 16), (2, 77, 5, 24, 10, 40)):
        angles = torch.randn(length, rope // 2, device="cuda")
        q = randn(batch, length, heads, nope + rope)
        kv = randn(batch, length, heads, nope + value)
        backward(*mla_rope(q, kv, randn(batch, length, rope), angles.cos(), angles.sin(), backend="triton"))
    for batch, length, heads, width in ((1, 1, 1, 64), (2, 77, 5, 96), (3, 11, 4, 128), (1, 9, 48, 128), (2, 3, 6, 10)):
        angles = torch.randn(length, width // 2, device="cuda")
        tables = angles.cos(), angles.sin()
        backward(normed_half_rope(randn(batch, length, heads, width), randn(width), *tables, 1e-6, backend="triton"))


def check_cross_entropy() -> None:
    for tokens, hidden, vocabulary in ((1, 64, 1000), (77, 64, 10001)):
        targets = torch.randint(vocabulary, (tokens,), device="cuda")
        targets[::3] = -100
        backward(linear_cross_entropy(randn(tokens, hidden), randn(vocabulary, hidden), targets))


def check_adamw() -> None:
    for moments in MOMENT_DTYPES:
        for master in MASTERS:
            for shape in ((1,), (3, 72), (5, 130, 129)):
                weight, gradient = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
                state = init_adamw_state(weight, moments, master)
                settings = AdamWHyperparameters(
                    learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, num_updates=1
                )
                adamw_update(weight, gradient, state, settings, gradient_scale=torch.ones((), device="cuda"), seed=1)


def main() -> None:
    torch.manual_seed(0)
    checks = (
        check_experts,
        check_fp8,
        check_router,
        check_attention,
        check_elementwise,
        check_cross_entropy,
        check_adamw,
    )
    for check in checks:
        if sys.argv[1:] and check.__name__.removeprefix("check_") not in sys.argv[1:]:
            continue
        check()
        torch.cuda.synchronize()
        print(f"{check.__name__} done", flush=True)


if __name__ == "__main__":
    main()
