"""What the plots of this folder share: the frame of a picture, and their command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def picture(width: int, height: int, elements: Iterable[str], *, font_size: int = 11) -> str:
    """The SVG of ``elements`` on white."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'font-family="sans-serif" font-size="{font_size}">',
            '<rect width="100%" height="100%" fill="white"/>',
            *elements,
            "</svg>\n",
        ]
    )


def draw_result(description: str | None, draw: Callable[[dict[str, Any]], str]) -> None:
    """The command of a plot: read a result, write what ``draw`` makes of it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("svg", type=Path)
    arguments = parser.parse_args()
    arguments.svg.write_text(draw(json.loads(arguments.result.read_text())))
