"""A plan's reasons, for a terminal, as JSON and as a self-contained page.

All three say the same: the decisions; where a step's time goes; what fills memory at the peak, and when that is; what
each alternative decision would cost; and where nothing fits, the nearest misses and the smallest changes that would.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from importlib.resources import files
from typing import Any

from rich.console import Console
from rich.table import Table

from moescale.plan import has_whole_weights
from moescale.planner.cost import MADE_PLAIN
from moescale.planner.exchange import can_divide_fp8
from moescale.planner.remedies import find_remedies, more_fp8
from moescale.planner.request import IN_COMPUTE_DTYPE, Candidate, decision_text, gemm_choices
from moescale.planner.result import Evaluated, PlanResult, alternative_summary, excess_bytes, excess_text, limits_text
from moescale.planner.timeline import Span, step_timeline
from moescale.planner.workload import Workload
from moescale.report.style import STYLE

GIB = 2**30
SHOWN_ALTERNATIVES = 16


def explain_json(result: PlanResult) -> dict[str, Any]:
    """The plan with its prediction and alternatives; where nothing fits ``near_misses`` and ``suggestions`` instead."""
    head = {
        "limit_bytes": round(result.limit_bytes),
        "host_limit_bytes": result.cluster.host_memory_bytes,
        "num_candidates": result.num_candidates,
    }
    if result.best is None:
        misses = [_miss_json(result, miss) for miss in result.near_misses]
        return {"fits": False, **head, "near_misses": misses, "suggestions": remedy_texts(result)}
    plan = json.loads(result.plan().to_json())
    hidden = {name: seconds for name, seconds in result.best.time.hidden.items() if seconds}
    plan["prediction"] |= {"hidden_seconds": hidden, "host_bytes": round(result.best.host_bytes)}
    said = {"notes": found} if (found := notes(result)) else {}
    return {"fits": True, **head, **said, "supported": result.best.supported, **plan}


def explain_text(result: PlanResult) -> str:
    """Tables for a terminal."""
    buffer = io.StringIO()
    # No markup: names in a cluster file or a path may hold brackets.
    console = Console(file=buffer, width=110, highlight=False, markup=False, emoji=False)
    console.print(model_text(result), soft_wrap=True)
    if result.best is None:
        _print_misses(console, result)
    else:
        _print_plan(console, result, result.best)
        _print_time(console, result, result.best)
        _print_memory(console, result, result.best)
        _print_alternatives(console, result)
    return buffer.getvalue().rstrip()


def explain_html(result: PlanResult) -> str:
    """One page without outside resources: a memory bar, a step timeline, and the tables."""
    import jinja2

    template = (files("moescale") / "planner" / "page.html").read_text()
    best = result.best
    shown = best or result.near_misses[0]
    return (
        jinja2.Environment(autoescape=True)
        .from_string(template)
        .render(
            style=STYLE,
            title=f"{result.request.runtime_gpus} x {result.cluster.gpu}",
            fits=best is not None,
            decisions={name: decision_text(value) for name, value in shown.decisions.items()},
            step_seconds=shown.time.total,
            tokens_per_second=result.request.tokens_per_step / shown.time.total,
            time_parts=_shares(group_time(result.workload, shown), shown.time.total),
            hidden={name: seconds for name, seconds in shown.time.hidden.items() if seconds > 0},
            lanes=_lanes(result, shown),
            micro_batches=shown.candidate.gradient_accumulation_steps,
            memory_parts=_shares(shown.memory.breakdown, max(result.limit_bytes, shown.memory.total)),
            peak_gib=shown.memory.total / GIB,
            limit_gib=result.limit_bytes / GIB,
            limit_percent=100 * result.limit_bytes / max(result.limit_bytes, shown.memory.total),
            moment=shown.memory.moment,
            model=model_text(result),
            excess=excess_text(result, shown),
            host_gib=shown.host_bytes / GIB,
            host_limit_gib=result.cluster.host_memory_bytes / GIB,
            alternatives=[alternative_text(result, other) for other in result.alternatives] if best else [],
            suggestions=[] if best else remedy_texts(result),
            notes=notes(result) if best else [],
        )
    )


def model_text(result: PlanResult) -> str:
    """What is planned for: the model, and the tokens of a step."""
    config, request = result.config, result.request
    experts = f", {config.num_experts} experts" if config.num_experts else ""
    return (
        f"model {config.fingerprint()}: {config.num_layers} layers{experts}, "
        f"{result.workload.parameters() / 1e9:,.3f} B parameters; "
        f"{request.tokens_per_step:,} tokens a step, in sequences of {request.sequence_length:,}"
    )


def group_time(workload: Workload, evaluated: Evaluated) -> dict[str, float]:
    """Exposed seconds of a step, operators gathered into the groups that they name, largest first."""
    operators = (op for kind in (*workload.layers, workload.outside) for op in kind.operators)
    groups = {f"compute {op.name}": op.group for op in operators if op.group is not None}
    groups[f"compute {MADE_PLAIN}"] = MADE_PLAIN
    parts: dict[str, float] = defaultdict(float)
    for name, seconds in evaluated.time.exposed.items():
        parts[groups.get(name, name)] += seconds
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def alternative_text(result: PlanResult, other: Evaluated) -> str:
    """For example ``ep 1 instead of 4: +31.0%, does not fit: exceeds GPU memory by 6.2 GiB``."""
    summary = alternative_summary(result, other)
    text = f"{summary['decision']} {summary['value']} instead of {summary['instead_of']}: {summary['slower_by']:+.1%}"
    if excess := excess_text(result, other):
        text += f", does not fit: exceeds {excess}"
    if summary["value"] == "stochastic_bf16":
        text += ", without exact weights (--allow-stochastic-rounding)"
    if not summary["supported"]:
        text += ", not supported by this version's runtime"
    return text + (f" (excluded by {', '.join(summary['excluded_by'])})" if summary["excluded_by"] else "")


def remedy_texts(result: PlanResult) -> list[str]:
    """Where nothing fits: each change that would make a plan fit, with what it would run like."""
    return [
        f"{remedy.change}: {remedy.peak_bytes / GIB:.1f} GiB, {remedy.step_seconds:.3f} s a step"
        for remedy in find_remedies(result)
    ]


def notes(result: PlanResult) -> list[str]:
    """What was asked for and the plan does not have, and why."""
    found = []
    best = None if result.best is None else result.best.candidate
    if best is not None and best.mesh.gpus > 1:
        if best.gemms != IN_COMPUTE_DTYPE and best.mesh.gpus > 2:
            found.append(
                "GEMMs in fp8 are measured on one and two GPUs; on more, their speed and memory are predicted alone. "
                "--precision bf16 plans without them."
            )
        reason = _reason_for_bf16(result, best)
        if reason is not None:
            found.append(reason)
    remedy = more_fp8(result)
    if remedy is not None:
        found.append(
            "The copies in fp8 of the experts' weights do not fit next to exact master weights. With "
            f"{remedy.change} they do: {remedy.step_seconds:.3f} s a step."
        )
    return found


def _reason_for_bf16(result: PlanResult, best: Candidate) -> str | None:
    """Why GEMMs of a plan for several GPUs are not in fp8, where the request would have them so."""
    dtype, wanted = result.request.compute_dtype, gemm_choices(result.request, result.config)
    if not has_whole_weights(best.mesh, best.dense_sharding):
        if wanted == [IN_COMPUTE_DTYPE]:
            return None
        return (
            "GEMMs in fp8 need whole weights on every rank (dense_sharding zero1): this plan's, whose dense_sharding "
            f"is {best.dense_sharding}, are in {dtype}."
        )
    can = can_divide_fp8(best.mesh, best.dense_sharding, result.cluster)
    if can or all(gemms.expert_gemms == "compute" for gemms in wanted):
        return None
    return (
        f"Experts are planned in fp8 where their ranks are in one node (ep {result.cluster.gpus_per_node} at most): "
        f"this plan's, with ep {best.mesh.ep}, are in {dtype}."
    )


def _print_plan(console: Console, result: PlanResult, best: Evaluated) -> None:
    request, mesh = result.request, best.candidate.mesh
    plan = result.plan()
    rate = request.tokens_per_step / best.time.total
    console.print(
        f"{plan.plan_gpus} {'GPUs hold' if plan.plan_gpus > 1 else 'GPU holds'} one copy of the weights, "
        f"{mesh.dp_replicate} cop{'ies' if mesh.dp_replicate > 1 else 'y'} on {request.runtime_gpus} x "
        f"{result.cluster.gpu}"
    )
    console.print(
        f"step {best.time.total:.3f} s, {rate:,.0f} tokens/s ({rate / request.runtime_gpus:,.0f} per GPU), "
        f"peak {best.memory.total / GIB:.1f} of {result.limit_bytes / GIB:.1f} GiB; best of {result.num_candidates:,}"
    )
    for note in notes(result):
        console.print(note, soft_wrap=True)
    if not best.supported:
        console.print("This version's runtime cannot run this plan.")
    table = Table("decision", "value", title="Plan", title_justify="left")
    for name, value in best.decisions.items():
        table.add_row(name, decision_text(value))
    table.add_row("gradient_accumulation_steps", str(best.candidate.gradient_accumulation_steps))
    console.print(table)


def _print_time(console: Console, result: PlanResult, best: Evaluated) -> None:
    table = Table("part", "seconds", "share", title="Step time", title_justify="left")
    for name, seconds in group_time(result.workload, best).items():
        if seconds > 0.0005 * best.time.total:
            table.add_row(name, f"{seconds:.3f}", f"{seconds / best.time.total:.1%}")
    for name, seconds in best.time.hidden.items():
        if seconds > 0:
            table.add_row(f"{name}, hidden", f"({seconds:.3f})", "")
    console.print(table)


def _print_memory(console: Console, result: PlanResult, best: Evaluated) -> None:
    title = f"Memory of a rank at the peak, which falls in the {best.memory.moment}"
    table = Table("class", "GiB", "share of the limit", title=title, title_justify="left")
    for name, size in best.memory.breakdown.items():
        if size > 0:
            table.add_row(name, f"{size / GIB:.2f}", f"{size / result.limit_bytes:.1%}")
    if best.host_bytes:
        limit = result.cluster.host_memory_bytes
        share = f"{best.host_bytes / limit:.1%} of the host's {limit / GIB:.1f} GiB"
        table.add_row("host: optimizer", f"{best.host_bytes / GIB:.2f}", share)
    console.print(table)


def _print_alternatives(console: Console, result: PlanResult) -> None:
    console.print("Alternatives")
    for other in result.alternatives[:SHOWN_ALTERNATIVES]:
        console.print(f"  {alternative_text(result, other)}", soft_wrap=True)
    if len(result.alternatives) > SHOWN_ALTERNATIVES:
        console.print(f"  and {len(result.alternatives) - SHOWN_ALTERNATIVES} slower ones (--json has all)")


def _print_misses(console: Console, result: PlanResult) -> None:
    console.print(f"Nothing fits {limits_text(result)}. Nearest misses:")
    for miss in result.near_misses:
        decisions = ", ".join(f"{name}={decision_text(value)}" for name, value in miss.decisions.items())
        console.print(f"  exceeds {excess_text(result, miss)}: {decisions}")
        largest = sorted(miss.memory.breakdown.items(), key=lambda item: -item[1])[:4]
        console.print("    largest: " + ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest))
    console.print("What would fit:")
    for suggestion in remedy_texts(result) or ["none of the changes tried"]:
        console.print(f"  {suggestion}")


def _miss_json(result: PlanResult, miss: Evaluated) -> dict[str, Any]:
    return {
        "decisions": {name: decision_text(value) for name, value in miss.decisions.items()},
        "peak_bytes": round(miss.memory.total),
        "host_bytes": round(miss.host_bytes),
        "exceeds_memory_by_bytes": 0,
        **excess_bytes(result, miss),
        "breakdown_bytes": {name: round(size) for name, size in miss.memory.breakdown.items()},
    }


COLORS = (
    *("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2"),
    *("#b279a2", "#ff9da6", "#9d755d", "#bab0ac", "#eeca3b"),
)


def _shares(parts: dict[str, float], total: float) -> list[dict[str, Any]]:
    return [
        {"name": name, "value": value, "percent": 100 * value / total, "color": COLORS[index % len(COLORS)]}
        for index, (name, value) in enumerate(item for item in parts.items() if item[1] > 0)
    ]


def _lanes(result: PlanResult, shown: Evaluated) -> list[dict[str, Any]]:
    """The step's timeline: a lane of what takes time, and one for each axis whose communication is hidden beneath."""
    timeline, total = step_timeline(result, shown), shown.time.total

    def drawn(spans: tuple[Span, ...], color: str | None = None) -> list[dict[str, Any]]:
        return [
            {
                "name": span.name,
                "seconds": span.seconds,
                "left": 100 * span.start / total,
                "width": 100 * span.seconds / total,
                "color": color or COLORS[index % len(COLORS)],
            }
            for index, span in enumerate(spans)
        ]

    return [
        {"name": "", "spans": drawn(timeline.spans)},
        *({"name": f"{name}, hidden", "spans": drawn(spans, "#888")} for name, spans in timeline.hidden.items()),
    ]
