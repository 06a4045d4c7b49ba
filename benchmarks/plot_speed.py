"""Draws the picture of the README from result files: tokens/s and where they come from.

    python benchmarks/plot_speed.py

writes docs/speed.svg: DeepSeek-Coder-V2-Lite on one H200 and nine of its layers on two H100, each beside the peers
that were measured with it. Needs nothing but Python.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from svg import picture

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "speed.svg"
OURS, PEERS = "#d55e00", "#56b4e9"  # of Okabe and Ito's palette, told apart with any colour vision
LABEL, WIDTH, BAR, GAP, VALUE = 250, 400, 20, 8, 90

Bar = tuple[str, float]


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def one_gpu() -> tuple[str, list[Bar]]:
    """Return the title and bars of one H200: forward and backward, at 8,192 tokens a micro-batch."""
    document = read("h200/step.json")
    bars = [("moescale", document["forward_backward_tokens_per_second"])]
    for row in document["baselines_forward_backward"]:
        if row["micro_batch_tokens"] == 8192:
            name, *details = row["what"].split(", ")
            bars.append((f"{name}, compiled" if "every layer compiled" in details else name, row["tokens_per_second"]))
    return "16B model, one H200, forward and backward, tokens/s", bars


def two_gpus() -> tuple[str, list[Bar]]:
    """Return the title and bars of two H100: whole steps, every system at the best setting that was tried."""
    document = read("h100x2/peers.json")
    best: dict[str, float] = {}
    for row in document["rows"]:
        best[row["system"]] = max(best.get(row["system"], 0.0), row["tokens_per_second"])
    names = {"moescale": "moescale", "transformers": "transformers 5.17, FSDP2", "torchtitan": "torchtitan 0.2.2"}
    bars = [(names[system], value) for system, value in best.items()]
    return f"{document['layers']} of its layers, two H100, whole steps, tokens/s", bars


def panel(title: str, bars: list[Bar], top: int) -> tuple[list[str], int]:
    """Return a panel's elements and the height at which the next one begins."""
    elements = [f'<text x="10" y="{top + 14}" font-weight="bold">{escape(title)}</text>']
    longest = max(value for _, value in bars)
    y = top + 26
    for label, value in bars:
        width = WIDTH * value / longest
        colour = OURS if label == "moescale" else PEERS
        elements += [
            f'<text x="{LABEL - 8}" y="{y + 14}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{LABEL}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>',
            f'<text x="{LABEL + width + 6:.1f}" y="{y + 14}">{value:,.0f}</text>',
        ]
        y += BAR + GAP
    return elements, y + 10


def draw() -> str:
    elements: list[str] = []
    top = 10
    for title, bars in (one_gpu(), two_gpus()):
        drawn, top = panel(title, bars, top)
        elements += drawn
    return picture(LABEL + WIDTH + VALUE, top, elements, font_size=13)


if __name__ == "__main__":
    PICTURE.write_text(draw())
