"""Where nothing fits: the smallest changes of the request, each alone, that would make a plan fit.

A change is not estimated but planned: the search runs again with the request changed, so a remedy is as sure as a plan.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moescale.errors import ConfigError
from moescale.planner.request import PlanRequest, gemm_choices
from moescale.planner.result import PlanResult, usable_bytes
from moescale.planner.search import compile_plan

GIBIBYTE = 2**30
_MAX_GPUS = 4096


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """One change after which a plan fits."""

    change: str
    """What to do, in the words of the command line."""
    step_seconds: float
    peak_bytes: int


def find_remedies(result: PlanResult) -> tuple[Remedy, ...]:
    """Changes of ``result.request``, none of whose plans fits, that make one fit; the least intrusive first."""
    found = []
    for change, requests in _changes(result):
        for value, request in requests():
            remedy = _try(result, change.format(value), request)
            if remedy is not None:
                found.append(remedy)
                break
    return tuple(found)


WORTH_SAYING = 0.97
"""A plan in fp8 is offered from this share of the step's time on."""


def more_fp8(result: PlanResult) -> Remedy | None:
    """For a plan that has no room for the copies of the experts' weights next to exact masters: the one without them.

    None where it is not faster by much.
    """
    request, best = result.request, result.best
    if best is None or not request.fp8_gemms or not request.exact_weights:
        return None
    can = any(gemms.expert_gemms == "fp8" for gemms in gemm_choices(request, result.config))
    if not can or best.candidate.gemms.expert_gemms == "fp8":
        return None
    in_fp8 = dataclasses.replace(request, exact_weights=False, pins={**request.pins, "expert_gemms": "fp8"})
    remedy = _try(result, "--allow-stochastic-rounding", in_fp8)
    return remedy if remedy is not None and remedy.step_seconds < WORTH_SAYING * best.time.total else None


def _try(result: PlanResult, change: str, request: PlanRequest) -> Remedy | None:
    try:
        changed = compile_plan(
            result.config,
            result.cluster,
            request,
            workload=dataclasses.replace(result.workload, lora=request.lora),
            with_alternatives=False,
        )
    except ConfigError:
        return None
    if changed.best is None:
        return None
    return Remedy(change=change, step_seconds=changed.best.time.total, peak_bytes=round(changed.best.memory.total))


_Requests = Callable[[], Iterator[tuple[str, PlanRequest]]]


def _changes(result: PlanResult) -> Iterator[tuple[str, _Requests]]:
    """Ways to change a request, each with its values from the smallest change on."""
    request = result.request
    replace = dataclasses.replace
    for name, value in request.pins.items():
        others = {key: kept for key, kept in request.pins.items() if key != name}
        yield f"drop --pin {name}={value}", _once(replace(request, pins=others))
    for name, value in sorted(request.forbidden):
        yield f"drop --forbid {name}={value}", _once(replace(request, forbidden=request.forbidden - {(name, value)}))
    if request.memory_limit_bytes is not None and request.memory_limit_bytes < usable_bytes(result.cluster, request):
        usable = usable_bytes(result.cluster, request) / GIBIBYTE
        yield (
            f"raise --memory-limit to {math.floor(10 * usable) / 10:.1f} GiB, what a plan may take of a "
            f"{result.cluster.gpu}",
            _once(replace(request, memory_limit_bytes=math.floor(10 * usable) * GIBIBYTE // 10)),
        )
    if request.plan_gpus is not None and request.plan_gpus < request.runtime_gpus:
        yield "--plan-gpus {}: fewer whole copies of the weights", lambda: _larger_units(request)
    if request.exact_weights:
        yield (
            "--allow-stochastic-rounding: bf16 weights without a master copy",
            _once(replace(request, exact_weights=False)),
        )
    if request.lora is not None and request.lora.base == "compute":
        lora = replace(request.lora, base="fp8")
        yield f"--lora {lora.text()}: frozen weights in fp8", _once(replace(request, lora=lora))
    yield "--sequence-length {}", lambda: _shorter_sequences(request)
    yield "--runtime-gpus {0} --plan-gpus {0}: more GPUs", lambda: _more_gpus(request)


def _once(request: PlanRequest) -> _Requests:
    return lambda: iter([("", request)])


def _larger_units(request: PlanRequest) -> Iterator[tuple[str, PlanRequest]]:
    assert request.plan_gpus is not None
    for unit in range(request.plan_gpus + 1, request.runtime_gpus + 1):
        if request.runtime_gpus % unit == 0:
            yield str(unit), dataclasses.replace(request, plan_gpus=unit)


def _shorter_sequences(request: PlanRequest) -> Iterator[tuple[str, PlanRequest]]:
    length = request.sequence_length
    while length % 2 == 0 and length > 128:
        length //= 2
        yield str(length), dataclasses.replace(request, sequence_length=length)


def _more_gpus(request: PlanRequest) -> Iterator[tuple[str, PlanRequest]]:
    gpus = request.runtime_gpus
    while gpus * 2 <= _MAX_GPUS:
        gpus *= 2
        tokens = max(request.tokens_per_step, gpus * request.sequence_length)
        yield str(gpus), dataclasses.replace(request, runtime_gpus=gpus, plan_gpus=gpus, tokens_per_step=tokens)
