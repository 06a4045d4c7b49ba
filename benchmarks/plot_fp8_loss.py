"""Draws a result of benchmarks/fp8_loss_curves.py as an SVG: loss in bf16 and fp8, and what lies between them.

    python benchmarks/plot_fp8_loss.py benchmarks/results/h100/fp8_loss.json benchmarks/results/h100/fp8_loss.svg

A row per part. Left the curves of every seed; right fp8 less bf16 by seed, over the band that the seeds in bf16 span
at that step. Needs nothing but Python.
"""

from __future__ import annotations

import math
from typing import Any
from xml.sax.saxutils import escape

from svg import draw_result, picture

COLOURS = {"bf16": "#0072b2", "fp8": "#d55e00"}  # of Okabe and Ito's palette, told apart with any colour vision
SEEDS = ("#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
WIDTH, HEIGHT, LEFT, GAP, TOP, BOTTOM = 400, 220, 52, 72, 64, 44

Points = list[tuple[float, float]]


class Panel:
    """Axes at a place of the picture: values to coordinates, and the elements drawn so far."""

    def __init__(self, left: float, top: float, steps: int, low: float, high: float) -> None:
        self.left, self.top, self.steps, self.low, self.high = left, top, steps, low, high
        self.elements: list[str] = []

    def x(self, step: float) -> float:
        return self.left + WIDTH * step / self.steps

    def y(self, value: float) -> float:
        """Values beyond the panel lie on its edge."""
        inside = min(max(value, self.low), self.high)
        return self.top + HEIGHT * (self.high - inside) / (self.high - self.low)

    def axes(self, title: str) -> None:
        self.elements.append(
            f'<text x="{self.left}" y="{self.top - 10}" font-weight="bold" font-size="12">{escape(title)}</text>'
        )
        unit = round_step((self.high - self.low) / 4)
        for number in range(math.ceil(self.low / unit), math.floor(self.high / unit) + 1):
            y = self.y(number * unit)
            self.elements += [
                f'<line x1="{self.left}" x2="{self.left + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>',
                f'<text x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end">{number * unit:.4g}</text>',
            ]
        unit = round_step(self.steps / 5)
        for number in range(int(self.steps / unit) + 1):
            self.elements.append(
                f'<text x="{self.x(number * unit):.1f}" y="{self.top + HEIGHT + 16}" text-anchor="middle">'
                f"{number * unit:g}</text>"
            )

    def line(self, points: Points, colour: str, dash: str = "") -> None:
        drawn = " ".join(f"{self.x(step):.1f},{self.y(value):.1f}" for step, value in points)
        self.elements.append(
            f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="1"'
            + (f' stroke-dasharray="{dash}"/>' if dash else "/>")
        )

    def band(self, lower: Points, upper: Points) -> None:
        drawn = " ".join(f"{self.x(step):.1f},{self.y(value):.1f}" for step, value in [*lower, *reversed(upper)])
        self.elements.append(f'<polygon points="{drawn}" fill="#e8e8e8"/>')


def round_step(about: float) -> float:
    """The nearest of 1, 2 and 5 times a power of ten that is not less."""
    power = 10.0 ** math.floor(math.log10(about))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= about * 0.999)


def points_of(run: dict[str, Any], steps: int) -> Points:
    """The middle of every window, and its mean loss."""
    every = run["every"]
    return [((i * every + min(steps, (i + 1) * every)) / 2, loss) for i, loss in enumerate(run["losses"])]


def draw_losses(part: dict[str, Any], top: float) -> list[str]:
    losses = [loss for run in part["runs"] for loss in run["losses"]]
    panel = Panel(LEFT, top, part["steps"], min(losses), max(losses))
    panel.axes(f"{part['what']}: loss by step")
    for run in part["runs"]:
        panel.line(points_of(run, part["steps"]), COLOURS[run["precision"]], "4 2" if run["precision"] == "fp8" else "")
    return panel.elements


def draw_differences(part: dict[str, Any], top: float) -> list[str]:
    """Empty unless a seed has both."""
    curves = {(run["precision"], run["seed"]): points_of(run, part["steps"]) for run in part["runs"]}
    seeds = sorted(seed for precision, seed in curves if precision == "fp8" and ("bf16", seed) in curves)
    if not seeds:
        return []
    differences = {
        seed: [
            (step, fp8 - bf16) for (step, bf16), (_, fp8) in zip(curves["bf16", seed], curves["fp8", seed], strict=True)
        ]
        for seed in seeds
    }
    of_step = zip(*(curves["bf16", seed] for seed in seeds), strict=True)
    spread = [(column[0][0], max(v for _, v in column) - min(v for _, v in column)) for column in of_step]
    # The first steps fall steeply: a tenth of them may lie beyond the panel.
    start = len(spread) // 10
    settled = [abs(value) for curve in [spread, *differences.values()] for _, value in curve[start:]]
    height = 1.1 * max(*settled, 1e-4)
    panel = Panel(LEFT + WIDTH + GAP, top, part["steps"], -height, height)
    panel.band([(step, -value) for step, value in spread], spread)
    panel.axes("fp8 less bf16; grey: seeds in bf16 apart")
    for number, curve in enumerate(differences.values()):
        panel.line(curve, SEEDS[number % len(SEEDS)])
    for number, seed in enumerate(seeds):
        x = panel.left + WIDTH - 60 * (len(seeds) - number)
        panel.elements.append(
            f'<text x="{x}" y="{top + HEIGHT + 32}" fill="{SEEDS[number % len(SEEDS)]}">seed {seed}</text>'
        )
    return panel.elements


def caption(part: dict[str, Any]) -> str:
    """The figures at the end."""
    words = []
    for key, name in (("final_loss", f"last {part['last']} steps"), ("validation_loss", "held out")):
        found = part["comparisons"][key]
        if "mean_difference" in found:
            words.append(f"{name}: fp8 {found['mean_difference']:+.4f}, seeds {found['spread_of_seeds']:.4f} apart")
    return "; ".join(words)


def draw(document: dict[str, Any]) -> str:
    """Return the SVG of a result document."""
    elements: list[str] = []
    top = TOP
    for part in document["parts"]:
        elements += draw_losses(part, top) + draw_differences(part, top)
        elements.append(f'<text x="{LEFT}" y="{top + HEIGHT + 32}">{escape(caption(part))}</text>')
        top += HEIGHT + BOTTOM + 36
    x = LEFT
    for precision, colour in COLOURS.items():
        elements.append(f'<rect x="{x}" y="26" width="10" height="10" fill="{colour}"/>')
        elements.append(f'<text x="{x + 14}" y="35">{precision}</text>')
        x += 70
    title = f"Training with GEMMs in bf16 and in fp8, same seeds and batches; {document['device']}"
    heading = f'<text x="{LEFT}" y="18" font-size="13">{escape(title)}</text>'
    return picture(LEFT + 2 * WIDTH + GAP + 20, top - 30, [heading, *elements])


if __name__ == "__main__":
    draw_result(__doc__, draw)
