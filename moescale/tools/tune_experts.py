"""Finds the launch parameters of the grouped GEMM kernels on the GPU at hand (``moescale bench experts --tune``).

Candidates are compiled in parallel processes into Triton's cache, each on operands without rows; then timed one after
the other on random operands. The result is the JSON document of a launch table.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch

from moescale.config import ModelConfig
from moescale.kernels.experts.launch_config import KERNELS, LaunchConfig, load_tables
from moescale.kernels.experts.operators import operators_of
from moescale.kernels.swiglu.reference import SwigluClamp
from moescale.tools.reference_table.published import read_published

# About 0.5 ms: longer than the host needs to queue one kernel.
SLEEP_CYCLES = 1_000_000
# Candidates are timed in rounds, each in another order, so that a clock that falls as the GPU warms hits all alike.
ROUNDS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """An expert MLP to tune for: T tokens with K experts each, out of E, with weights [2F, H] and [H, F]."""

    tokens: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int

    @property
    def rows(self) -> int:
        """Routed rows, T * K."""
        return self.tokens * self.top_k


# DeepSeek-Coder-V2-Lite, at the sizes of the reference's published table.
_TABLE = read_published().grouped_gemm
LITE_SHAPES = tuple(
    ExpertShape(
        tokens=row.tokens,
        num_experts=row.num_experts,
        top_k=_TABLE.top_k,
        hidden_size=_TABLE.hidden_size,
        intermediate_size=_TABLE.intermediate_size,
    )
    for row in _TABLE.rows
)


# Tokens of the micro-batches for which a model's experts are tuned; a lookup takes the nearest in rows per expert.
TUNED_TOKENS = (4096, 8192, 16384)


def shapes_of_model(config: ModelConfig) -> tuple[ExpertShape, ...]:
    """Return what to tune for a model with routed experts, of ``TUNED_TOKENS`` each."""
    assert config.num_experts is not None
    return tuple(
        ExpertShape(
            tokens=tokens,
            num_experts=config.num_experts,
            top_k=config.top_k,
            hidden_size=config.hidden_size,
            intermediate_size=config.expert_intermediate_size,
        )
        for tokens in TUNED_TOKENS
    )


def product_shape(kernel: str, shape: ExpertShape) -> tuple[int, int]:
    """Return (n, k), the weight shape by which the launch table knows a kernel (for gradients: their rows, columns)."""
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    return {
        "up": (2 * ffn, hidden),
        "down": (hidden, ffn),
        "down_dgrad": (ffn, hidden),
        "up_dgrad": (hidden, 2 * ffn),
        "up_wgrad": (2 * ffn, hidden),
        "down_wgrad": (hidden, ffn),
    }[kernel]


def candidate_launches(kernel: str) -> tuple[LaunchConfig, ...]:
    """Return the launches to try for ``kernel``: large tiles alone on a multiprocessor, or two smaller ones."""
    # block_m, block_n, block_k, num_stages, num_warps, programs_per_sm, store_splits
    alone = [(128, 256, 64, 3, 8, 1, 2), (128, 256, 64, 4, 8, 1, 2), (256, 128, 64, 4, 8, 1, 2)]
    paired = [(128, 128, 64, 3, 4, 2, 2), (128, 128, 64, 3, 4, 2, 4), (128, 128, 32, 6, 4, 2, 2)]
    weight_gradient = kernel.endswith("wgrad")
    halves = (False,) if weight_gradient else (False, True)
    groups = (1, 4, 8) if weight_gradient else (1, 4)
    return tuple(
        LaunchConfig(
            block_m=m,
            block_n=n,
            block_k=k,
            num_stages=stages,
            num_warps=warps,
            programs_per_sm=programs,
            store_splits=splits,
            group_m=group,
            half_tiles=half,
        )
        for (m, n, k, stages, warps, programs, splits), group, half in itertools.product(alone + paired, groups, halves)
    )


def make_call(
    kernel: str,
    shape: ExpertShape,
    ends: torch.Tensor,
    fill: Callable[..., torch.Tensor],
    *,
    backend: Literal["triton", "cute"] = "triton",
    clamp: SwigluClamp | None = None,
    has_biases: bool = False,
) -> Callable[[Any], object]:
    """Return a function that runs ``kernel`` once with a launch (``cute``: a tile); ``fill(*shape)`` makes operands."""
    ops = operators_of(backend)
    option = {"triton": "launch", "cute": "tile"}[backend]
    groups = ops.group_rows(ends, shape.rows)
    rows, experts, hidden, ffn = shape.rows, shape.num_experts, shape.hidden_size, shape.intermediate_size
    options: dict[str, Any] = {}
    if kernel in ("up", "down_dgrad") and clamp is not None:
        options["clamp"] = clamp
    if kernel in ("up", "down") and has_biases:
        options["bias"] = fill(experts, product_shape(kernel, shape)[0])
    operands: tuple[Any, ...]
    if kernel == "up":
        run, operands = ops.multiply_up, (fill(rows, hidden), fill(experts, 2 * ffn, hidden), groups)
        options |= {"write_pre": True, "write_act": True}
    elif kernel == "down":
        run, operands = ops.multiply_rows, (fill(rows, ffn), fill(experts, hidden, ffn), groups)
    elif kernel == "up_dgrad":
        run, operands = ops.multiply_rows, (fill(rows, 2 * ffn), fill(experts, 2 * ffn, hidden), groups)
        options |= {"transposed": True, "kernel": kernel}
    elif kernel == "down_dgrad":
        weighted = (fill(rows, 2 * ffn), groups, torch.rand(rows, device=ends.device))
        run, operands = ops.multiply_down_dgrad, (fill(rows, hidden), fill(experts, hidden, ffn), *weighted)
    else:
        m, n = product_shape(kernel, shape)
        run, operands = ops.weight_gradient, (fill(rows, m), fill(rows, n), groups)
        options["kernel"] = kernel
    return lambda launch: run(*operands, **options, **{option: launch})


def measure_ms(run: Callable[[], Any], *, warmup: int = 1, runs: int = 5, sleep_cycles: int = SLEEP_CYCLES) -> float:
    """Return the median time of ``run`` on the GPU in milliseconds, by CUDA events.

    The GPU first sleeps long enough for the host to queue the work, as it would be queued in a training step; so the
    time holds no launch overhead.
    """
    times = []
    for i in range(warmup + runs):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(sleep_cycles)
        begin.record()
        run()
        end.record()
        end.synchronize()
        if i >= warmup:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def _compile(jobs: Sequence[tuple[str, ExpertShape, LaunchConfig]]) -> list[str]:
    """Compile each job by running it on experts without rows; return why jobs failed, '' where they did not."""
    errors = []
    for kernel, shape, launch in jobs:
        ends = torch.zeros(shape.num_experts, dtype=torch.int32, device="cuda")
        small = dataclasses.replace(shape, tokens=128, num_experts=shape.num_experts)

        def fill(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.bfloat16, device="cuda")

        try:
            make_call(kernel, small, ends, fill)(launch)
            torch.cuda.synchronize()
            errors.append("")
        except Exception as error:  # a launch that does not fit the GPU is an outcome, not a failure of the search
            errors.append(f"{type(error).__name__}: {str(error)[-200:]}")
    return errors


def compile_all(jobs: Sequence[tuple[str, ExpertShape, LaunchConfig]], processes: int) -> list[str]:
    """Compile all jobs in ``processes`` processes."""
    chunks = [jobs[i::processes] for i in range(processes)]
    context = multiprocessing.get_context("spawn")
    errors = [""] * len(jobs)
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        for i, result in enumerate(pool.map(_compile, chunks)):
            errors[i::processes] = result
    return errors


def random_ends(shape: ExpertShape, seed: int = 0) -> torch.Tensor:
    """Return the cumulative rows of experts that tokens choose uniformly at random."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, shape.num_experts, (shape.rows,), generator=generator)
    return torch.bincount(ids, minlength=shape.num_experts).cumsum(0).to(torch.int32).cuda()


def tune(
    shapes: Iterable[ExpertShape] = LITE_SHAPES,
    kernels: Iterable[str] = KERNELS,
    candidates: Callable[[str], Sequence[LaunchConfig]] = candidate_launches,
) -> dict[str, Any]:
    """Return the launch table of this GPU as a JSON document, with the milliseconds of every candidate under "timings".

    The shipped table's entries for other shapes are kept. Takes some minutes; the candidates of one kernel are the same
    for all shapes, so they are compiled once.
    """
    shapes, kernels = tuple(shapes), tuple(kernels)
    jobs = [(kernel, shapes[0], launch) for kernel in kernels for launch in candidates(kernel)]
    errors = compile_all(jobs, processes=max(1, min(len(jobs), (os.cpu_count() or 2) - 1)))
    entries, timings = [], []
    for shape in shapes:
        ends = random_ends(shape)
        for kernel in kernels:
            call = make_call(kernel, shape, ends, _random_operand)
            launches = [job[2] for job, error in zip(jobs, errors, strict=True) if job[0] == kernel and not error]
            milliseconds = _measure_rounds(call, launches)
            for launch, ms in milliseconds.items():
                timings.append({"kernel": kernel, **dataclasses.asdict(shape), **dataclasses.asdict(launch), "ms": ms})
            if milliseconds:
                n, k = product_shape(kernel, shape)
                entry = {"kernel": kernel, "rows": shape.rows, "num_experts": shape.num_experts, "n": n, "k": k}
                best = min(milliseconds, key=milliseconds.__getitem__)
                entries.append({**entry, "launch": dataclasses.asdict(best)})
    failures = [f"{kernel} {launch}: {error}" for (kernel, _, launch), error in zip(jobs, errors, strict=True) if error]
    gpu = torch.cuda.get_device_name()
    entries = _kept_entries(gpu, entries) + entries
    return {"gpu": gpu, "entries": entries, "timings": timings, "failures": failures}


def _kept_entries(gpu: str, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the shipped entries of ``gpu`` that none of ``entries`` replaces."""
    table = load_tables().get(gpu)
    found = [] if table is None else [dataclasses.asdict(entry) for entry in table.entries]

    def shape(entry: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in entry.items() if name != "launch"}

    replaced = [shape(entry) for entry in entries]
    return [entry for entry in found if shape(entry) not in replaced]


def _measure_rounds(call: Callable[[LaunchConfig], Any], launches: Sequence[LaunchConfig]) -> dict[LaunchConfig, float]:
    """Return the median over the rounds for every launch."""
    order = random.Random(0)
    times: dict[LaunchConfig, list[float]] = {launch: [] for launch in launches}
    for _ in range(ROUNDS):
        for launch in order.sample(launches, len(launches)):
            times[launch].append(measure_ms(functools.partial(call, launch)))
    return {launch: statistics.median(samples) for launch, samples in times.items()}


def _random_operand(*size: int) -> torch.Tensor:
    return torch.randn(size, dtype=torch.bfloat16, device="cuda") * 0.1
