"""Benchmarks of the expert MLP against its peers on the GPU at hand (``moescale bench experts --json``).

Scope ``mlp``: gate, up, SwiGLU and down on rows already sorted by expert, forward and backward. Scope ``layer``: from
the router to the combined output, with sort and gather. Peers run in the same process, in alternation, so that all
meet the same clocks:

- ``cute``: the optional back end, where it is installed;
- ``fp8``, of a layer: products in e4m3, with copies of the weights that were written before, as after an update;
- ``grouped_mm``: PyTorch's grouped product under ``torch.compile`` (which fuses SwiGLU), in the faster of the weight
  layouts [E, out, in] and [E, in, out];
- ``dense``: the six products alone, back to back, all rows through one expert, in cuBLAS: the practical limit;
- ``reference_published``: what the reference published for its kernel, measured on an H100.

Times are those of the GPU: the host queues each run's work ahead, as in a training step. FLOPs are the experts' alone.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F

from moescale.kernels.backends import runs_cute
from moescale.kernels.experts import expert_mlp, experts
from moescale.kernels.experts.sort import sort_pairs
from moescale.kernels.fp8 import copies_of, objection_to_fp8
from moescale.kernels.fp8.routed import fp8_experts
from moescale.kernels.fp8.scaled import Copies
from moescale.kernels.router import route, router_logits
from moescale.tools.measurement import describe_measurement
from moescale.tools.reference_table.published import read_published
from moescale.tools.tune_experts import LITE_SHAPES, ExpertShape, measure_ms

# Grouped GEMMs on an H100: (tokens, experts) -> forward, backward in milliseconds.
REFERENCE_PUBLISHED = {
    (row.tokens, row.num_experts): (row.forward_ms, row.backward_ms) for row in read_published().grouped_gemm.rows
}
LAYER_SHAPES = tuple(s for s in LITE_SHAPES if s.num_experts == 64 and s.tokens >= 8192)
ROUTINGS = ("uniform", "skewed")
ROUNDS = 5
# About 3 ms: longer than the host needs to queue a forward or backward of any contender.
SLEEP_CYCLES = 6_000_000
SKEW = 0.7
"""Skewed routing: the popularity of the e-th expert is proportional to (e + 1) ** -SKEW."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """One implementation to time. ``backward(out, retain)`` returns all gradients of what ``forward`` returned; it can
    be called again if it was told to retain what the forward saved.
    """

    backend: str
    forward: Callable[[], torch.Tensor]
    backward: Callable[[torch.Tensor, bool], Any]


def differentiated(
    backend: str, forward: Callable[[], torch.Tensor], inputs: tuple[torch.Tensor, ...], grad: torch.Tensor
) -> Contender:
    """Return the contender whose backward is autograd's, for all ``inputs``."""
    return Contender(
        backend=backend,
        forward=forward,
        backward=lambda out, retain: torch.autograd.grad(out, inputs, grad, retain_graph=retain),
    )


def choose_experts(shape: ExpertShape, routing: str, seed: int = 0) -> torch.Tensor:
    """Return topk_ids [T, K] int32 on the GPU, distinct per token: all experts alike, or some far more popular."""
    generator = torch.Generator().manual_seed(seed)
    exponent = SKEW if routing == "skewed" else 0.0
    popularity = torch.arange(1, shape.num_experts + 1).double() ** -exponent
    # Gumbel top-k: K draws without replacement in proportion to popularity.
    noise = -torch.empty(shape.tokens, shape.num_experts, dtype=torch.double).exponential_(generator=generator).log()
    return (popularity.log() + noise).topk(shape.top_k).indices.int().cuda()


def our_backends() -> tuple[str, ...]:
    """The back ends of the experts to measure here."""
    return ("triton", "cute") if runs_cute("experts", torch.device("cuda"), torch.bfloat16) else ("triton",)


def forward_backward_flops(shape: ExpertShape) -> float:
    """FLOPs of gate, up and down, forward and both gradients: 3 products of 2 R H F, three times each."""
    return 18.0 * shape.rows * shape.hidden_size * shape.intermediate_size


def bench_experts(
    shapes: Iterable[ExpertShape] = LITE_SHAPES,
    layer_shapes: Iterable[ExpertShape] = LAYER_SHAPES,
    routings: Iterable[str] = ROUTINGS,
) -> dict[str, Any]:
    """Return ``rows`` of every contender at every shape and routing, with what describes the measurement."""
    # Gradients are taken repeatedly from one forward; and every shape compiles anew.
    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = 64
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        for routing in routings:
            rows += _measure(_mlp_contenders(shape, routing), shape, "mlp", routing)
        if (shape.tokens, shape.num_experts) in REFERENCE_PUBLISHED:
            times = REFERENCE_PUBLISHED[shape.tokens, shape.num_experts]
            rows.append(_row(shape, "mlp", "uniform", "reference_published", *times, peak_bytes=None))
    for shape in layer_shapes:
        for routing in routings:
            rows += _measure(_layer_contenders(shape, routing), shape, "layer", routing)
    return describe_measurement("transformers", "quack-kernels") | {"rows": _best_layouts(rows)}


def _random(*size: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(size, dtype=torch.bfloat16, device="cuda") * scale).requires_grad_()


def _mlp_contenders(shape: ExpertShape, routing: str) -> list[Contender]:
    hidden, ffn, num_experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
    *_, ends = sort_pairs(choose_experts(shape, routing), num_experts)
    rows, grad = _random(shape.rows, hidden), torch.randn(shape.rows, hidden, device="cuda").bfloat16()
    gate_up, down = _random(num_experts, 2 * ffn, hidden, scale=0.02), _random(num_experts, hidden, ffn, scale=0.02)
    # The same values stored [E, in, out].
    gate_up_t, down_t = (w.detach().transpose(1, 2).contiguous().requires_grad_() for w in (gate_up, down))
    ours = [
        differentiated(
            name, functools.partial(expert_mlp, rows, gate_up, down, ends, backend=name), (rows, gate_up, down), grad
        )
        for name in our_backends()
    ]
    compiled = torch.compile(_grouped_mm_mlp, dynamic=False)
    plain = functools.partial(compiled, rows, gate_up.transpose(1, 2), down.transpose(1, 2), ends)
    transposed = functools.partial(compiled, rows, gate_up_t, down_t, ends)
    return [
        *ours,
        differentiated("grouped_mm[E,out,in]", plain, (rows, gate_up, down), grad),
        differentiated("grouped_mm[E,in,out]", transposed, (rows, gate_up_t, down_t), grad),
        _dense_contender(shape),
    ]


def _grouped_mm_mlp(rows: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    gate, up = F.grouped_mm(rows, gate_up, offs=ends).chunk(2, -1)
    return F.grouped_mm(F.silu(gate) * up, down, offs=ends)


def _layer_contenders(shape: ExpertShape, routing: str) -> list[Contender]:
    hidden, ffn, num_experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
    x, grad = _random(shape.tokens, hidden), torch.randn(shape.tokens, hidden, device="cuda").bfloat16()
    router = _random(num_experts, hidden, scale=hidden**-0.5)
    gate_up, down = _random(num_experts, 2 * ffn, hidden, scale=0.02), _random(num_experts, hidden, ffn, scale=0.02)
    # A bias on the logits makes some experts popular; both contenders get it.
    bias = torch.arange(1, num_experts + 1, device="cuda").log() * -(2 * SKEW if routing == "skewed" else 0.0)
    inputs = (x, router, gate_up, down)
    peer = functools.partial(torch.compile(_layer, dynamic=False), *inputs, bias, shape.top_k, "grouped_mm")
    ours = [
        differentiated(name, functools.partial(_layer, *inputs, bias, shape.top_k, name), inputs, grad)
        for name in our_backends()
    ]
    if objection_to_fp8(x.device) is None:
        copies = copies_of(gate_up), copies_of(down)
        fp8 = functools.partial(_layer, *inputs, bias, shape.top_k, "triton", copies)
        ours.append(differentiated("fp8", fp8, inputs, grad))
    return [*ours, differentiated("grouped_mm", peer, inputs, grad)]


def _layer(
    x: torch.Tensor,
    router: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    backend: str,
    copies: tuple[Copies, Copies] | None = None,
) -> torch.Tensor:
    logits = router_logits(x, router) + bias
    routing = route(
        logits,
        top_k=top_k,
        group_limited=False,
        normalize_topk=False,
        routed_scaling_factor=1.0,
        num_sequences=None,
        backend="torch" if backend == "grouped_mm" else "triton",
    )
    if copies is not None:
        return fp8_experts(x, routing.topk_ids, routing.topk_weights, gate_up, down, *copies)
    if backend != "grouped_mm":
        return experts(x, routing.topk_ids, routing.topk_weights, gate_up, down, backend=backend)
    return _grouped_mm_experts(x, routing.topk_ids, routing.topk_weights, gate_up, down)


def _grouped_mm_experts(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """The layer as one writes it for ``torch.compile``: sort, gather, two grouped products, weigh, scatter back."""
    num_tokens, top_k = ids.shape
    order = ids.flatten().argsort(stable=True)
    counts = torch.zeros(gate_up.shape[0], dtype=torch.int32, device=x.device)
    ends = counts.scatter_add(0, ids.flatten().long(), torch.ones_like(ids.flatten())).cumsum(0).to(torch.int32)
    out = _grouped_mm_mlp(x[order // top_k], gate_up.transpose(1, 2), down.transpose(1, 2), ends)
    out = out * weights.flatten()[order].unsqueeze(1).to(out.dtype)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return out[inverse].view(num_tokens, top_k, -1).sum(1)


def _measure(contenders: list[Contender], shape: ExpertShape, scope: str, routing: str) -> list[dict[str, Any]]:
    samples: dict[str, list[tuple[float, float]]] = {c.backend: [] for c in contenders}
    peaks = {c.backend: _peak_bytes(c) for c in contenders}  # also compiles
    for _ in range(ROUNDS):
        for contender in contenders:
            forward_ms = measure_ms(contender.forward, sleep_cycles=SLEEP_CYCLES)
            out = contender.forward()
            backward = functools.partial(contender.backward, out, True)
            samples[contender.backend].append((forward_ms, measure_ms(backward, sleep_cycles=SLEEP_CYCLES)))
            del out, backward
    rows = []
    for name, times in samples.items():
        forward_ms, backward_ms = (statistics.median(column) for column in zip(*times, strict=True))
        rows.append(_row(shape, scope, routing, name, forward_ms, backward_ms, peak_bytes=peaks[name]))
    return rows


def _peak_bytes(contender: Contender) -> int:
    """Return the memory that a forward and backward allocate at most, gradients included, inputs not."""
    for _ in range(2):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contender.backward(contender.forward(), False)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _dense_contender(shape: ExpertShape) -> Contender:
    """The six products with all rows in one expert, and nothing between them."""
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    x, grad, pre, act = (_random(shape.rows, n).detach() for n in (hidden, hidden, 2 * ffn, ffn))
    gate_up, down = _random(2 * ffn, hidden, scale=0.02).detach(), _random(hidden, ffn, scale=0.02).detach()

    def forward() -> torch.Tensor:
        x @ gate_up.T
        return act @ down.T

    def backward(_out: torch.Tensor, _retain: bool) -> tuple[torch.Tensor, ...]:
        return grad @ down, grad.T @ act, pre.T @ x, pre @ gate_up

    return Contender(backend="dense", forward=forward, backward=backward)


def _row(
    shape: ExpertShape,
    scope: str,
    routing: str,
    backend: str,
    forward_ms: float,
    backward_ms: float,
    peak_bytes: int | None,
) -> dict[str, Any]:
    return {
        "scope": scope,
        "tokens": shape.tokens,
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "routing": routing,
        "backend": backend,
        "forward_ms": round(forward_ms, 4),
        "backward_ms": round(backward_ms, 4),
        "tflops": round(forward_backward_flops(shape) / (forward_ms + backward_ms) / 1e9, 1),
        "peak_bytes": peak_bytes,
    }


def _best_layouts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep of the weight layouts of ``grouped_mm`` the faster one per shape and routing, naming it in "layout"."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        name, bracket, layout = row["backend"].partition("[")
        if bracket:
            row = {**row, "backend": name, "layout": bracket + layout}
        key = tuple(row[field] for field in ("scope", "tokens", "num_experts", "routing", "backend"))
        if key not in kept or row["tflops"] > kept[key]["tflops"]:
            kept[key] = row
    return list(kept.values())
