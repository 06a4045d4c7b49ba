"""The document of ``bench reference`` as a picture: whole steps on the left, grouped GEMMs on the right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moescale.errors import ConfigError
from moescale.tools.reference_table.text import origin, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png", ".pdf")
# Of Okabe and Ito's palette, told apart with any colour vision.
_COLORS = {"published": "#999999", "measured": "#d55e00", "predicted": "#e69f00", "limit": "#222222"}
_BACKEND_COLORS = {"grouped_mm": "#56b4e9", "triton": "#d55e00", "cute": "#cc79a7", "dense": "#009e73"}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moescale",
    "font.size": 9,
    "text.parse_math": False,  # a cluster's name may have dollars
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def check_plot(path: Path) -> None:
    """Refuse, before the work, a picture that cannot be drawn. Raises ConfigError."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--plot ({path}) must end in {', '.join(SUFFIXES)}, which name the kind of picture")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"--plot ({path}) is drawn with matplotlib, which is not installed; pip install 'moescale[report]'"
        ) from None


def draw_reference(document: dict[str, Any], path: Path) -> None:
    """Draw the document's rows into ``path``, of the kind that its suffix names."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(12.5, 4.6), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2, width_ratios=(1, 2.2))
        _draw_steps(left, document["step"])
        _draw_grouped_gemm(right, document["grouped_gemm"])
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, metadata=metadata)


def _draw_steps(axes: Axes, rows: list[dict[str, Any]]) -> None:
    shown = [row for row in rows if row["tokens_per_second_per_gpu"] is not None]
    values = [row["tokens_per_second_per_gpu"] for row in shown]
    bars = axes.bar(range(len(shown)), values, color=[_COLORS[row["what"]] for row in shown])
    axes.bar_label(bars, [f"{value:,.0f}" for value in values], fontsize=8)
    names = [f"{row['what']}\n{row['gpus']} x {short_name(row['gpu'])}" for row in shown]
    axes.set_xticks(range(len(shown)), names, fontsize=7)
    axes.set_title("A whole step: tokens/s per GPU", fontsize=10)
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _draw_grouped_gemm(axes: Axes, rows: list[dict[str, Any]]) -> None:
    sizes = list(dict.fromkeys((row["tokens"], row["num_experts"]) for row in rows))
    names = dict.fromkeys(_contender(row) for row in rows)
    width = 0.85 / len(names)
    for index, name in enumerate(names):
        found = [row for row in rows if _contender(row) == name]
        at = [
            sizes.index((row["tokens"], row["num_experts"])) + width * (index - len(names) / 2 + 0.5) for row in found
        ]
        color = _BACKEND_COLORS.get(found[0]["backend"], _COLORS[found[0]["what"]])
        axes.bar(at, [row["tflops"] for row in found], 0.9 * width, color=color, label=name)
    axes.set_xticks(range(len(sizes)), [f"{tokens:,} tokens\n{experts} experts" for tokens, experts in sizes])
    axes.set_title("Grouped GEMMs, forward and backward: TFLOP/s", fontsize=10)
    axes.set_ylim(0, 1.3 * max(row["tflops"] for row in rows))
    axes.legend(ncols=3, fontsize=7, loc="upper left")


def _contender(row: dict[str, Any]) -> str:
    name = origin(row) if row["what"] in ("published", "measured") else row["what"]
    return f"{name} ({short_name(row['gpu'])})"
