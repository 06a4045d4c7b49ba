"""The style of all HTML pages: colours for light and dark mode, plots that fit narrow screens."""

from __future__ import annotations

from pathlib import Path

STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
"""CSS; ``var(--ink)``, ``--faint``, ``--line``, ``--blue``, ``--orange``, ``--green`` and ``--red`` are its colours."""
