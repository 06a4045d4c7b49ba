"""Draws a result of ``moescale bench experts --json`` as an SVG: TFLOP/s of the expert MLP, forward and backward.

    python benchmarks/plot_experts.py benchmarks/results/h200/experts.json benchmarks/results/h200/experts.svg

One panel per routing; one group of bars per size, one bar per back end. Needs nothing but Python.
"""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

from svg import draw_result, picture

# Order, label and colour (Okabe and Ito's palette, told apart with any colour vision).
BACKENDS = {
    "reference_published": ("reference, published (H100)", "#999999"),
    "grouped_mm": ("torch grouped_mm, compiled", "#56b4e9"),
    "triton": ("moescale, Triton", "#d55e00"),
    "cute": ("moescale, CuTe", "#cc79a7"),
    "dense": ("one dense expert, cuBLAS", "#009e73"),
}
BAR, GAP, HEIGHT, LEFT, TOP, BOTTOM = 22, 26, 240, 56, 64, 40


def panel(rows: list[dict[str, Any]], routing: str, top: int, ceiling: float) -> tuple[list[str], int]:
    """Return the SVG elements of one routing's panel and its width; ``ceiling`` is the TFLOP/s of its full height."""
    sizes = sorted({(row["tokens"], row["num_experts"]) for row in rows})
    values = {(row["tokens"], row["num_experts"], row["backend"]): row["tflops"] for row in rows}
    backends = [name for name in BACKENDS if any(key[2] == name for key in values)]
    group = len(backends) * BAR + GAP
    width = LEFT + len(sizes) * group
    base = top + HEIGHT
    elements = [f'<text x="{LEFT}" y="{top - 12}" font-weight="bold">{escape(routing)} routing</text>']
    for mark in range(0, int(ceiling) + 1, 200):
        y = base - HEIGHT * mark / ceiling
        elements.append(f'<line x1="{LEFT}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        elements.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{mark}</text>')
    for i, (tokens, experts) in enumerate(sizes):
        left = LEFT + i * group + GAP / 2
        for j, backend in enumerate(backends):
            value = values.get((tokens, experts, backend))
            if value is None:
                continue
            x, height = left + j * BAR, HEIGHT * value / ceiling
            elements.append(
                f'<rect x="{x:.1f}" y="{base - height:.1f}" width="{BAR - 2}" height="{height:.1f}" '
                f'fill="{BACKENDS[backend][1]}"/>'
            )
            elements.append(
                f'<text x="{x + BAR / 2 - 1:.1f}" y="{base - height - 3:.1f}" text-anchor="middle" '
                f'font-size="9">{value:.0f}</text>'
            )
        middle = left + len(backends) * BAR / 2
        elements.append(f'<text x="{middle:.1f}" y="{base + 16}" text-anchor="middle">{tokens} / {experts}</text>')
    return elements, width


def draw(document: dict[str, Any]) -> str:
    """Return the SVG of a result document."""
    rows = [row for row in document["rows"] if row["scope"] == "mlp" and row["backend"] in BACKENDS]
    if not rows:
        raise SystemExit("no rows of scope 'mlp' in the result; write it with `moescale bench experts --json`")
    # Routings are compared with the published figures too, which are of no particular routing.
    published = [row for row in rows if row["backend"] == "reference_published"]
    routings = sorted({row["routing"] for row in rows}, reverse=True)
    ceiling = 1.1 * max(row["tflops"] for row in rows)
    elements: list[str] = []
    width, top = 0, TOP
    for routing in routings:
        measured = [row for row in rows if row["routing"] == routing and row not in published]
        drawn, panel_width = panel(measured + published, routing, top, ceiling)
        elements += drawn
        width, top = max(width, panel_width), top + HEIGHT + BOTTOM + 36
    legend = LEFT
    for label, colour in BACKENDS.values():
        elements.append(f'<rect x="{legend}" y="30" width="10" height="10" fill="{colour}"/>')
        elements.append(f'<text x="{legend + 14}" y="39">{escape(label)}</text>')
        legend += 34 + 6 * len(label)
    title = f"Expert MLP, forward + backward, TFLOP/s; tokens / experts, top-6; {document['gpu']}"
    heading = f'<text x="{LEFT}" y="18" font-size="13">{escape(title)}</text>'
    return picture(max(width, legend) + 10, top - 36, [heading, *elements])


if __name__ == "__main__":
    draw_result(__doc__, draw)
