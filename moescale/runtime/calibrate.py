"""Measures this machine for the planner, and writes the cluster file of ``moescale calibrate``.

GEMMs, experts, attention, element-wise operators and the optimizer run with the kernels of training, at the range of
sizes that plans contain. Links between GPUs are measured when several processes were started (``torchrun``). Rates
come from short benchmarks; ``sustained_clock`` is the fraction of them that remains under continuous load.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from moescale.errors import ConfigError
from moescale.kernels.adamw import AdamWHyperparameters, adamw_update, init_adamw_state
from moescale.kernels.attention import attention
from moescale.kernels.experts import expert_mlp, experts
from moescale.kernels.experts.sort import sort_pairs
from moescale.kernels.fp8 import copies_of, kernels_for, objection_to_fp8
from moescale.kernels.fp8.linear import multiply
from moescale.kernels.fp8.routed import fp8_experts
from moescale.kernels.fp8.scaled import Copies, Scaled
from moescale.kernels.rms_norm import rms_norm
from moescale.models.flops import peak_flops
from moescale.runtime.calibrate_links import measure_links
from moescale.runtime.device import choose_device
from moescale.runtime.gpu_clock import copy_rate, seconds_of

ROWS = 8192
GEMM_WIDTHS = ((2048, 64), (2048, 512), (2048, 2048), (2048, 6144), (4096, 4096), (8192, 8192))
"""(in, out) features of dense GEMMs on ``ROWS`` rows, by increasing FLOPs."""
EXPERT_TOKENS = (256, 683, 2048, 4096, 8192, 16384)
EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 64, 6, 2048, 1408
SEQUENCES = (512, 2048, 8192, 32768)
HEADS, QK_DIM, V_DIM = 16, 192, 128
SUSTAINED_SECONDS = 15.0
MIN_SUSTAINED_CLOCK = 0.6
"""A cluster file with a lower value is refused (``planner.cluster``)."""


def calibrate_machine(say: Callable[[str], None]) -> dict[str, Any] | None:
    """Measure the first GPU; under ``torchrun``, each process's own GPU and the links. Returns None on other ranks.

    Raises ConfigError without a GPU.
    """
    local_rank = os.environ.get("LOCAL_RANK", "0")
    device = choose_device(f"cuda:{local_rank}" if torch.cuda.is_available() else "auto")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return calibrate(device, say)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    try:
        is_first = dist.get_rank() == 0
        document = calibrate(device, say if is_first else lambda _: None)
        return document if is_first else None
    finally:
        dist.destroy_process_group()


def calibrate(device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure ``device`` for one to two minutes, reporting progress to ``say``, and return a cluster file's document.

    Raises ConfigError without a GPU.
    """
    if device.type != "cuda":
        raise ConfigError(
            "calibrate needs a CUDA device; torch sees none. Use a shipped cluster file, or --cluster PATH"
        )
    properties = torch.cuda.get_device_properties(device)
    copy = copy_rate(device)
    say(f"copy {copy / 1e12:.2f} TB/s")
    dense = _dense_rates(device)
    say(f"dense GEMMs {_range(dense[1])}")
    experts = _expert_rates(device)
    say(f"experts {_range(experts[1])}")
    attention_rates = _attention_rates(device)
    say(f"attention {_range(attention_rates[1])}")
    fp8 = _fp8_rates(device)
    for name, (_, rates) in fp8.items():
        say(f"{name} {_range(rates)}")
    clock = plausible_clock(lambda: _sustained_clock(device, max(dense[1])))
    say(f"sustained clock {clock:.3f}")
    host = _host_rate(device)
    say(f"host link {host / 1e9:.0f} GB/s")
    links, link_sources = measure_links(device, seconds_of)
    for name, link in links.items():
        say(f"{name} {link['bytes_per_second'] / 1e9:.0f} GB/s, {link['latency_seconds'] * 1e6:.1f} us")
    measured = "measured by moescale calibrate"
    document: dict[str, Any] = {
        "name": properties.name.lower().replace(" ", "-"),
        "gpu": properties.name,
        "gpus_per_node": max(8, torch.cuda.device_count()),
        "memory_bytes": properties.total_memory,
        "host_memory_bytes": _host_memory() // max(1, torch.cuda.device_count()),
        "peak_flops_per_second": peak_flops(device) or max(dense[1]),
        "sustained_clock": clock,
        "memory_bytes_per_second": copy,
        "elementwise_bytes_per_second": _elementwise_rate(device),
        "optimizer_bytes_per_second": _optimizer_rate(device),
        "launch_seconds": _launch_seconds(device),
        "step_overhead_seconds": 0.01,
        "allocator_slack": 0.04,
        "context_bytes": _context_bytes(device),
        "dense_gemm": {"sizes": dense[0], "flops_per_second": dense[1]},
        "grouped_gemm": {"sizes": experts[0], "flops_per_second": experts[1]},
        **{name: {"sizes": sizes, "flops_per_second": rates} for name, (sizes, rates) in fp8.items()},
        "attention": {"sizes": attention_rates[0], "flops_per_second": attention_rates[1]},
        **links,
        "inter_node": {"latency_seconds": 15e-6, "bytes_per_second": 42e9},
        "host": {"latency_seconds": 20e-6, "bytes_per_second": host},
    }
    assumed = {
        "inter_node": "assumed: 400 Gb/s per GPU, at 85%",
        "gpus_per_node": "assumed where fewer are visible",
        "step_overhead_seconds": "assumed",
        "allocator_slack": "assumed: as on an H200",
        "peak_flops_per_second": "data sheet where the GPU is known",
    } | link_sources
    document["sources"] = {name: assumed.get(name, measured) for name in document if name not in ("name", "gpu")}
    return document


def to_toml(document: dict[str, Any]) -> str:
    """Return the document as TOML: scalars first, then one table per key."""
    scalars = [f"{key} = {_toml(value)}" for key, value in document.items() if not isinstance(value, dict)]
    tables = [
        "\n".join([f"[{key}]", *(f"{name} = {_toml(item)}" for name, item in value.items())])
        for key, value in document.items()
        if isinstance(value, dict)
    ]
    return "\n".join(scalars) + "\n\n" + "\n\n".join(tables) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _dense_rates(device: torch.device) -> tuple[list[float], list[float]]:
    """Measure the mean rate of a GEMM and the two of its backward, by FLOPs."""
    sizes, rates = [], []
    for inputs, outputs in GEMM_WIDTHS:
        x = torch.randn(ROWS, inputs, device=device).bfloat16()
        weight = torch.randn(outputs, inputs, device=device).bfloat16()
        grad = torch.randn(ROWS, outputs, device=device).bfloat16()

        def gemms(x: torch.Tensor = x, weight: torch.Tensor = weight, grad: torch.Tensor = grad) -> None:
            torch.mm(x, weight.t())
            torch.mm(grad, weight)
            torch.mm(grad.t(), x)

        flops = 2.0 * ROWS * inputs * outputs
        sizes.append(flops)
        rates.append(3 * flops / seconds_of(gemms))
    return sizes, rates


def _expert_rates(device: torch.device) -> tuple[list[float], list[float]]:
    """Measure forward and backward by rows per expert, with gradients added to bf16 buffers as in training."""
    gate_up, down = _expert_weights(device)
    buffers = [torch.zeros_like(weight, requires_grad=False) for weight in (gate_up, down)]
    sizes, rates = [], []
    for tokens in EXPERT_TOKENS:
        ids = torch.rand(tokens, EXPERTS, device=device).topk(TOP_K).indices.int()
        ends = sort_pairs(ids, EXPERTS)[-1]
        rows = torch.randn(tokens * TOP_K, HIDDEN, device=device).bfloat16().requires_grad_()
        grad = torch.randn_like(rows)

        def run(rows: torch.Tensor = rows, ends: torch.Tensor = ends, grad: torch.Tensor = grad) -> None:
            out = expert_mlp(rows, gate_up, down, ends, gate_up_gradient=buffers[0], down_gradient=buffers[1])
            torch.autograd.grad(out, rows, grad)

        sizes.append(tokens * TOP_K / EXPERTS)
        rates.append(18.0 * tokens * TOP_K * HIDDEN * INTERMEDIATE / seconds_of(run))
    return sizes, rates


def _fp8_rates(device: torch.device) -> dict[str, tuple[list[float], list[float]]]:
    """Measure GEMMs in e4m3 by the names of their tables in a cluster file; none where the GPU has no kernels of ours.

    Of linear layers the products alone, operands quantised before. Of experts forward and backward with everything that
    quantises, as :func:`_expert_rates` without it: gather and combination are priced by themselves, so what they take
    in bf16 is taken off.
    """
    if objection_to_fp8(device) is not None:
        return {}
    sizes, rates = [], []
    for inputs, outputs in GEMM_WIDTHS:
        x = torch.randn(ROWS, inputs, device=device).bfloat16()
        weight = torch.randn(outputs, inputs, device=device).bfloat16()
        copies = copies_of(weight)
        quantize = kernels_for(x).quantize_rows
        rows, grad = quantize(x), quantize(torch.randn(ROWS, outputs, device=device).bfloat16())

        def gemms(rows: Scaled = rows, grad: Scaled = grad, copies: Copies = copies, outputs: int = outputs) -> None:
            multiply(rows, copies.rows[0], copies.scales)
            multiply(grad, copies.columns[:, :outputs], copies.scales)

        flops = 2.0 * ROWS * inputs * outputs
        sizes.append(flops)
        rates.append(2 * flops / seconds_of(gemms))
    return {"fp8_dense_gemm": (sizes, rates), "fp8_grouped_gemm": _fp8_expert_rates(device)}


def _fp8_expert_rates(device: torch.device) -> tuple[list[float], list[float]]:
    gate_up, down = _expert_weights(device)
    buffers: dict[str, Any] = {
        f"{name}_gradient": torch.zeros_like(weight, requires_grad=False)
        for name, weight in (("gate_up", gate_up), ("down", down))
    }
    copies = [copies_of(weight) for weight in (gate_up, down)]
    sizes, rates = [], []
    for tokens in EXPERT_TOKENS:
        x = torch.randn(tokens, HIDDEN, device=device).bfloat16().requires_grad_()
        weights, ids = torch.rand(tokens, EXPERTS, device=device).softmax(-1).topk(TOP_K)
        weights.requires_grad_()
        ends = sort_pairs(ids, EXPERTS)[-1]
        rows = torch.randn(tokens * TOP_K, HIDDEN, device=device).bfloat16().requires_grad_()
        routed = (x, ids.int(), weights, gate_up, down)
        contenders: dict[str, Callable[[], torch.Tensor]] = {
            "fp8": partial(fp8_experts, *routed, *copies, **buffers),
            "bf16": partial(experts, *routed, **buffers),
            "bf16 on rows": partial(expert_mlp, rows, gate_up, down, ends, **buffers),
        }

        def seconds(name: str, contenders=contenders, x=x, weights=weights, rows=rows) -> float:
            wanted = (rows,) if name == "bf16 on rows" else (x, weights)
            grad = torch.ones_like(rows if name == "bf16 on rows" else x)
            return seconds_of(lambda: torch.autograd.grad(contenders[name](), wanted, grad))

        around = max(0.0, seconds("bf16") - seconds("bf16 on rows"))
        whole = seconds("fp8")
        sizes.append(tokens * TOP_K / EXPERTS)
        rates.append(18.0 * tokens * TOP_K * HIDDEN * INTERMEDIATE / max(whole - around, whole / 2))
    return sizes, rates


def _expert_weights(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up [E, 2F, H], and down [E, H, F]."""
    shapes = (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    weights = [(torch.randn(EXPERTS, *shape, device=device) * 0.02).bfloat16().requires_grad_() for shape in shapes]
    return weights[0], weights[1]


def _attention_rates(device: torch.device) -> tuple[list[float], list[float]]:
    """Measure causal forward and backward by sequence length, counting the FLOPs of the causal half."""
    rates = []
    for length in SEQUENCES:
        batch = max(1, ROWS // length)
        q, k = (torch.randn(batch, length, HEADS, QK_DIM, device=device).bfloat16().requires_grad_() for _ in range(2))
        v = torch.randn(batch, length, HEADS, V_DIM, device=device).bfloat16().requires_grad_()
        grad = torch.randn(batch, length, HEADS, V_DIM, device=device).bfloat16()

        def run(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v, grad: torch.Tensor = grad) -> None:
            out = attention(q, k, v, softmax_scale=QK_DIM**-0.5, documents=None)
            torch.autograd.grad(out, (q, k, v), grad)

        rates.append(3.0 * batch * length * HEADS * length * (QK_DIM + V_DIM) / seconds_of(run))
    return [float(length) for length in SEQUENCES], rates


def _elementwise_rate(device: torch.device) -> float:
    x = torch.randn(4 * ROWS, HIDDEN, device=device).bfloat16()
    weight = torch.ones(HIDDEN, device=device).bfloat16()
    with torch.no_grad():
        return 2 * x.nbytes / seconds_of(lambda: rms_norm(x, weight, 1e-6))


def _optimizer_rate(device: torch.device) -> float:
    """Measure bytes per second of the slowest format: 8-bit moments with exact master weights."""
    parameter = torch.randn(2**17, HIDDEN, device=device).bfloat16()
    gradient, scale = torch.randn_like(parameter), torch.ones((), device=device)
    state = init_adamw_state(parameter, "int8", "bf16_remainder")
    hyperparameters = AdamWHyperparameters(
        learning_rate=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, num_updates=2
    )
    seconds = seconds_of(
        lambda: adamw_update(parameter, gradient, state, hyperparameters, gradient_scale=scale, seed=1)
    )
    return parameter.numel() * (2 * 2 + 2 + 2 * (2 + 8 / 128 + 2)) / seconds


def _launch_seconds(device: torch.device) -> float:
    """Measure the time of an empty kernel in a sequence of launches."""
    x = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(100):
            x.add_(1.0)

    return seconds_of(many) / 100


def plausible_clock(measure: Callable[[], float]) -> float:
    """Return the highest of at most three measurements, stopping at a plausible one. Raises ConfigError if none is.

    Another process on the GPU can only slow a GEMM down, so the highest measurement is the closest to the truth.
    """
    clocks: list[float] = []
    while len(clocks) < 3 and max(clocks, default=0.0) < MIN_SUSTAINED_CLOCK:
        clocks.append(measure())
    if max(clocks) < MIN_SUSTAINED_CLOCK:
        values = ", ".join(f"{clock:.2f}" for clock in clocks)
        raise ConfigError(
            f"sustained_clock was measured three times as {values}, and must be at least {MIN_SUSTAINED_CLOCK}: power "
            "and heat lower a GPU's clock by a quarter at most. Something else uses this GPU; calibrate when it is idle"
        )
    return max(clocks)


def _sustained_clock(device: torch.device, fastest: float) -> float:
    """Return the rate of a large GEMM after seconds of load, divided by its rate at the start.

    The rate at the start is checked against ``fastest``, the FLOP/s measured before: another process on the GPU during
    these milliseconds would hide how far the clock drops.
    """
    x = torch.randn(8192, 8192, device=device).bfloat16()
    out = torch.empty_like(x)
    torch.cuda.synchronize(device)
    time.sleep(2.0)
    cold = seconds_of(lambda: torch.mm(x, x, out=out), repeats=3)
    started = time.monotonic()
    while time.monotonic() - started < SUSTAINED_SECONDS:
        for _ in range(50):
            torch.mm(x, x, out=out)
        torch.cuda.synchronize(device)
    warm = min(seconds_of(lambda: torch.mm(x, x, out=out), repeats=5) for _ in range(3))
    cold = min(cold, 2.0 * 8192**3 / fastest)
    return min(1.0, cold / warm)


def _host_rate(device: torch.device) -> float:
    host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(2**28, dtype=torch.uint8, device=device)
    return host.numel() / seconds_of(lambda: target.copy_(host, non_blocking=True))


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _context_bytes(device: torch.device) -> int:
    """Return the device memory in use beyond this process's tensors."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return max(0, total - free - torch.cuda.memory_reserved(device))


def _range(rates: list[float]) -> str:
    return f"{min(rates) / 1e12:.0f} to {max(rates) / 1e12:.0f} TFLOP/s"
