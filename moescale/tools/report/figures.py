"""Draws a run as SVG that takes its colours from the page, so that one drawing serves light and dark.

matplotlib draws. Colours are stood for by others that nothing else uses, and are replaced by the page's variables in
the finished SVG.
"""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moescale.errors import ConfigError
from moescale.tools.report.run_data import ExpertLoads, RunData

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 4.6, 2.7
"""Inches. Narrow, so that letters stay readable where the page is a telephone's."""
MAX_POINTS = 800
"""Of a curve; longer ones are thinned by means, which a screen cannot show anyway."""
STAND_INS = {
    "#010203": "var(--ink)",
    "#010205": "var(--faint)",
    "#010207": "var(--line)",
    "#01020b": "var(--blue)",
    "#01020d": "var(--orange)",
    "#010211": "var(--green)",
    "#010213": "var(--red)",
}
INK, FAINT, LINE, BLUE, ORANGE, GREEN, RED = STAND_INS
RUN_COLORS = (BLUE, ORANGE, GREEN, RED)
DEAD_LOAD, OVERLOADED = 0.05, 3.0
"""Loads from which on an expert is named: nearly none, and three times an even share."""


def draw(paint: Callable[[Axes], None], *, height: float = HEIGHT) -> str:
    """Return an SVG element of one set of axes that ``paint`` fills. Raises ConfigError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "moescale report draws with matplotlib, which is not installed; pip install 'moescale[report]'"
        ) from None
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "font.size": 9,
        "font.family": "sans-serif",
        "text.parse_math": False,  # a folder's name may have dollars
        "text.color": INK,
        "axes.labelcolor": FAINT,
        "axes.edgecolor": LINE,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "svg.hashsalt": "moescale",
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        paint(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _adapted(buffer.getvalue())


def _adapted(svg: str) -> str:
    """The ``svg`` element alone, in the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    for stand_in, variable in STAND_INS.items():
        svg = svg.replace(stand_in, variable)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most ``MAX_POINTS`` points, each the mean of its neighbours."""
    if len(steps) <= MAX_POINTS:
        return list(map(float, steps)), list(values)
    size = math.ceil(len(steps) / MAX_POINTS)
    parts = range(0, len(steps), size)
    return (
        [statistics.fmean(steps[start : start + size]) for start in parts],
        [statistics.fmean(values[start : start + size]) for start in parts],
    )


def smoothed(values: Sequence[float], share: float = 0.02) -> list[float]:
    """A centred mean over ``share`` of the points."""
    half = max(1, int(len(values) * share / 2))
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _label(run: RunData) -> str:
    """The run's name; matplotlib leaves out what begins with an underscore."""
    return f"\u200b{run.name}" if run.name.startswith("_") else run.name


def loss_figure(runs: Sequence[RunData]) -> str:
    """Training loss, faint and smoothed, and validation losses as points."""

    def paint(axes: Axes) -> None:
        for run, color in zip(runs, RUN_COLORS, strict=False):
            label = _label(run) if len(runs) > 1 else "training"
            steps, losses = thinned(*run.series("loss"))
            axes.plot(steps, losses, color=color, alpha=0.3, linewidth=0.8)
            axes.plot(steps, smoothed(losses), color=color, linewidth=1.4, label=label)
            points = [(e.step, e.validation_loss) for e in run.validations if e.validation_loss is not None]
            if points:
                alone = len(runs) == 1
                look: dict[str, Any] = dict(color=ORANGE, label="validation") if alone else dict(color=color)
                axes.plot(*zip(*points, strict=True), "o", markersize=3.5, **look)
        axes.set_ylabel("nats per token")
        axes.set_xlabel("step")
        if runs[0].steps:
            axes.legend()

    return draw(paint)


def curve_figure(runs: Sequence[RunData], name: str, label: str, *, scale: float = 1.0, log: bool = False) -> str:
    """One metric of every run over its steps."""

    def paint(axes: Axes) -> None:
        for run, color in zip(runs, RUN_COLORS, strict=False):
            steps, values = thinned(*run.series(name))
            axes.plot(steps, [value * scale for value in values], color=color, linewidth=1.2, label=_label(run))
        axes.set_ylabel(label)
        axes.set_xlabel("step")
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if len(runs) > 1:
            axes.legend()

    return draw(paint)


def bars_figure(planned: Mapping[str, float], actual: float | None, unit: str, *, limit: float | None = None) -> str:
    """The parts of a plan as horizontal bars, their sum and, where known, what was measured."""
    largest = sorted(planned.items(), key=lambda item: item[1], reverse=True)
    shown, rest = largest[:9], sum(value for _, value in largest[9:])
    rows = [(name, value, BLUE) for name, value in shown] + ([("others", rest, BLUE)] if rest else [])
    rows.append(("planned, in all", sum(planned.values()), FAINT))
    if actual is not None:
        rows.append(("measured", actual, ORANGE))

    def paint(axes: Axes) -> None:
        names = [name for name, _, _ in rows]
        axes.barh(range(len(rows)), [value for _, value, _ in rows], color=[color for _, _, color in rows], height=0.7)
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        for number, (_, value, _) in enumerate(rows):
            axes.text(value, number, f" {value:.3g}", va="center", fontsize=8, color=INK)
        axes.margins(x=0.15)
        if limit is not None:
            axes.axvline(limit, color=RED, linewidth=1)

    return draw(paint, height=0.26 * len(rows) + 0.7)


def load_figure(loads: Sequence[ExpertLoads]) -> str:
    """Over steps, the fullest expert of every MoE layer: 1 is an even share."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    values = np.array([[max(layer) for layer in record.load] for record in loads]).T

    def paint(axes: Axes) -> None:
        mesh = axes.pcolormesh(
            [record.step for record in loads],
            range(values.shape[0]),
            values,
            cmap="magma_r",
            vmin=1,
            vmax=max(2.0, float(values.max())),
            shading="nearest",
            rasterized=True,
        )
        axes.set_xlabel("step")
        axes.set_ylabel("MoE layer")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.figure.colorbar(mesh, ax=axes, label="load of the fullest expert")

    return draw(paint)


def experts_figure(loads: Sequence[ExpertLoads]) -> str:
    """Each expert's mean load over the last records: white is even, blue is less, red is more."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    values = np.array(mean_loads(loads))

    def paint(axes: Axes) -> None:
        image = axes.imshow(
            np.log2(np.maximum(values, 2.0**-5)),
            cmap="RdBu_r",
            vmin=-4,
            vmax=4,
            aspect="auto",
            interpolation="nearest",
        )
        axes.set_xlabel("expert")
        axes.set_ylabel("MoE layer")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        bar = axes.figure.colorbar(image, ax=axes, label="load", ticks=[-4, -2, 0, 2, 4])
        bar.ax.set_yticklabels(["1/16", "1/4", "1", "4", "16"])

    return draw(paint)


def mean_loads(loads: Sequence[ExpertLoads], records: int = 10) -> list[list[float]]:
    """Per MoE layer, every expert's mean load over the last ``records``."""
    recent = [record.load for record in loads[-records:]]
    return [[statistics.fmean(load) for load in zip(*layer, strict=True)] for layer in zip(*recent, strict=True)]


def named_experts(loads: Sequence[ExpertLoads]) -> list[dict[str, Any]]:
    """Layers with experts that are dead or overloaded, and their numbers."""
    rows = []
    for layer, values in enumerate(mean_loads(loads)):
        dead = [number for number, load in enumerate(values) if load < DEAD_LOAD]
        over = [number for number, load in enumerate(values) if load > OVERLOADED]
        if dead or over:
            rows.append({"layer": layer, "dead": dead, "overloaded": over, "most": max(values)})
    return rows
