"""Puts a run, or several, into a self-contained HTML page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from moescale.plan import ParallelPlan
from moescale.report.style import STYLE
from moescale.tools.report import figures
from moescale.tools.report.run_data import RunData

PAGE = Path(__file__).parent / "page.html"
WARM_UP_STEPS = 3
"""Left out of times: they compile."""
MAX_SAMPLES = 6
"""Steps of which a prompt's continuations are shown."""
GIB = 2**30


def run_page(run: RunData, now: datetime) -> str:
    """The page about one run; ``now`` is when it was made."""
    return _render(
        title=run.name,
        runs=[run],
        now=now,
        summary=summarized(run),
        plots=_plots([run]) + _plan_plots(run),
        samples=continued_prompts(run),
        experts=figures.named_experts(run.loads),
        differences=None,
        decisions=_decisions(run.plan),
        alternatives=[] if run.plan is None else run.plan.alternatives[:8],
    )


def comparison_page(runs: Sequence[RunData], now: datetime) -> str:
    """The page that lays curves of several runs over each other and lists what differs between them."""
    return _render(
        title=" and ".join(run.name for run in runs),
        runs=runs,
        now=now,
        summary=None,
        plots=_plots(runs),
        samples=[],
        experts=None,
        differences=differences(runs),
        decisions=None,
        alternatives=None,
    )


def continued_prompts(run: RunData) -> list[dict[str, Any]]:
    """Each prompt that was continued, with what the corpus has and what the model said after several steps.

    Of many samples ``MAX_SAMPLES`` are shown, evenly spaced, the first and the last among them.
    """
    events = run.samples
    if len(events) > MAX_SAMPLES:
        events = [events[index * (len(events) - 1) // (MAX_SAMPLES - 1)] for index in range(MAX_SAMPLES)]
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for event in events:
        for sample in event.samples:
            row = rows.setdefault((sample.sequence, sample.prompt), {"prompt": sample.prompt, "answers": []})
            row["wanted"] = sample.wanted
            row["answers"].append((event.step, sample.answer))
    return list(rows.values())


def differences(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Settings, decisions of the plan and what else was written down, where runs differ; then how they ended."""
    rows = []
    entries = [described(run) for run in runs]
    for name in sorted(set().union(*entries)):
        values = [entry.get(name) for entry in entries]
        if any(value != values[0] for value in values):
            rows.append({"name": name, "values": values})
    outcomes = [summarized(run) for run in runs]
    rows += [{"name": name, "values": [outcome.get(name) for outcome in outcomes]} for name in outcomes[0]]
    return rows


def described(run: RunData) -> dict[str, Any]:
    entries: dict[str, Any] = {f"run.{name}": value for name, value in run.settings.items()}
    entries |= {name: value for name, value in run.description.items() if not isinstance(value, Mapping | list)}
    entries |= {f"plan.{name}": value for name, value in _decisions(run.plan).items()}
    return entries


def _decisions(plan: ParallelPlan | None) -> dict[str, Any]:
    """What a plan decides, without what it was decided from."""
    if plan is None:
        return {}
    names = [
        *("runtime_gpus", "sequence_length", "tokens_per_step", "micro_batch_sequences", "gradient_accumulation_steps"),
        *("compute_dtype", "optimizer_state_dtype", "master_weight_format", "gradient_dtype", "dense_sharding"),
        *("offload_optimizer", "expert_gemms", "dense_gemms"),
    ]
    mesh = " ".join(f"{axis} {size}" for axis, size in vars(plan.mesh).items() if size > 1)
    return {"mesh": mesh or "one device"} | {name: getattr(plan, name) for name in names}


def summarized(run: RunData) -> dict[str, str]:
    """The figures at the top, as text."""
    total = run.settings.get("steps")
    rows = {"steps": f"{run.last_step:,}" + (f" of {total:,}" if isinstance(total, int) else "")}
    _, losses = run.series("loss")
    if losses:
        rows["training loss"] = f"{losses[0]:.4f} at first, {statistics.fmean(losses[-10:]):.4f} over the last 10 steps"
    validations = [event.validation_loss for event in run.validations if event.validation_loss is not None]
    if validations:
        rows["validation loss"] = f"{validations[-1]:.4f} at last, {min(validations):.4f} at best"
    _, rates = run.series("tokens_per_second")
    if rates:
        rows["tokens per second"] = f"{statistics.median(rates[WARM_UP_STEPS:] or rates):,.0f}"
    _, utilization = run.series("mfu")
    if utilization:
        rows["model FLOPs utilization"] = f"{statistics.median(utilization):.1%}"
    seconds = _step_seconds(run)
    if seconds is not None:
        on_gpu = max(run.series("peak_bytes")[1], default=0.0) > 0
        prediction = None if run.plan is None or not on_gpu else run.plan.prediction
        planned = None if prediction is None else prediction.step_seconds
        rows["seconds per step"] = f"{seconds:.3g}" + ("" if planned is None else f", planned {planned:.3g}")
    skipped = sum(1 for event in run.steps if event.skipped)
    if skipped:
        rows["skipped steps"] = str(skipped)
    if run.num_damaged:
        rows["damaged lines of metrics"] = str(run.num_damaged)
    if run.checkpoints:
        rows["last checkpoint"] = f"step {run.checkpoints[-1].step}"
    return rows


def _step_seconds(run: RunData) -> float | None:
    _, seconds = run.series("step_seconds")
    return statistics.median(seconds[WARM_UP_STEPS:] or seconds) if seconds else None


def _plots(runs: Sequence[RunData]) -> list[tuple[str, str]]:
    """Caption and SVG of the curves."""
    if not any(run.steps for run in runs):
        return []
    plots = [
        ("Loss", figures.loss_figure(runs)),
        ("Tokens per second", figures.curve_figure(runs, "tokens_per_second", "tokens/s")),
    ]
    if any(run.series("mfu")[0] for run in runs):
        plots.append(("Model FLOPs utilization", figures.curve_figure(runs, "mfu", "%", scale=100)))
    plots += [
        ("Learning rate", figures.curve_figure(runs, "learning_rate", "")),
        ("Gradient norm before clipping", figures.curve_figure(runs, "gradient_norm", "", log=True)),
    ]
    if any(max(run.series("peak_bytes")[1], default=0) > 0 for run in runs):
        plots.append(("Peak memory of tensors", figures.curve_figure(runs, "peak_bytes", "GiB", scale=1 / GIB)))
    return plots


def _plan_plots(run: RunData) -> list[tuple[str, str]]:
    plots = []
    if run.loads:
        plots.append(("Expert load over time: the fullest expert of each layer", figures.load_figure(run.loads)))
        plots.append(("Expert load at the end: every expert", figures.experts_figure(run.loads)))
    prediction = None if run.plan is None else run.plan.prediction
    peak = max(run.series("peak_bytes")[1], default=0.0)
    if prediction is not None and peak > 0:  # on a CPU, a plan says nothing
        memory = {name: value / GIB for name, value in prediction.breakdown_bytes.items() if value}
        # What torch reports does not have the CUDA context and NCCL in it.
        outside = sum(prediction.breakdown_bytes.values()) - (prediction.allocated_bytes or prediction.peak_bytes)
        actual = (peak + outside) / GIB
        plots.append(("Memory of a GPU at the peak, by the plan", figures.bars_figure(memory, actual, "GiB")))
        seconds = {name.removeprefix("compute "): part for name, part in prediction.breakdown_seconds.items()}
        plots.append(("A step's time, by the plan", figures.bars_figure(seconds, _step_seconds(run), "s")))
    return plots


def _render(**fields: Any) -> str:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["svg"] = Markup
    page = environment.from_string(PAGE.read_text(encoding="utf-8")).render(style=Markup(STYLE), **fields)
    return page.encode(errors="backslashreplace").decode()  # names of files may hold what UTF-8 cannot
