"""``moescale show``: print sequences of a corpus, with the learned tokens in colour."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from moescale.errors import printable, say

if TYPE_CHECKING:
    from moescale.tools.corpus_view import CorpusView, DocumentView, Run, SequenceView, Totals

_OPEN, _CLOSE = "{+", "+}"
"""Marks around learned text in output without colours, as in git's word diff."""
_GUTTER = "| "
"""Prefix of every line of content, which could otherwise be mistaken for a line of this command."""


def show_command(
    data: Path,
    *,
    first: int | None = None,
    sequence: tuple[int, ...] = (),
    split: str = "train",
    tokenizer: str | None = None,
    json: bool = False,
) -> None:
    """Print sequences of a corpus: learned tokens in green (without colours: {+so+}), documents, padding.

    Line breaks of the text are shown as ↵, and control characters as their codes.

    Parameters
    ----------
    data
        Folder written by `prepare`, or by `save_to_disk` of datasets.
    first
        Number of sequences to print, from the first one; default: 3.
    sequence
        Index of a sequence to print, from 0; repeatable.
    split
        Split to print.
    tokenizer
        Tokenizer of the corpus; default: the one that its manifest names. Without any, ids are printed.
    json
        Print sequences and totals as JSON on standard output.
    """
    from moescale.tools.corpus_view import CorpusView, chosen

    view = CorpusView(data, split=split, tokenizer=tokenizer)
    indices = chosen(view, first, sequence)
    if json:
        document = {
            "split": split,
            "notice": view.notice,
            "totals": asdict(view.totals()),
            "sequences": [asdict(view.sequence(index)) for index in indices],
        }
        say(json_module.dumps(document, indent=2))
        return
    page = _Page(view)
    if view.notice is not None:
        page.line(f"ids instead of text: {view.notice}", style="yellow")
    for index in indices:
        page.sequence(view.sequence(index))
    page.line(_totals_line(split, view.totals(), page.noun), style="bold")


class _Page:
    """Prints views, in colour if the terminal supports it."""

    def __init__(self, view: CorpusView) -> None:
        self._console = Console(markup=False, emoji=False, highlight=False)
        self._in_colour = self._console.color_system is not None and not self._console.no_color
        self._separator = "" if view.has_text else " "
        self._line_end = self._spelled("↵")
        self.noun = "conversation" if view.holds_conversations else "document"

    def line(self, text: str, style: str = "") -> None:
        self._print(Text(self._spelled(text, keep=""), style=style))

    def sequence(self, view: SequenceView) -> None:
        relabelled = f" ({view.num_relabelled:,} as another token)" if view.num_relabelled else ""
        learned = f"{view.num_learned:,} tokens{relabelled}" if view.chooses_targets else "everything"
        self.line(f"sequence {view.index}: {len(view.tokens):,} tokens, learned: {learned}", style="bold")
        for number, document in enumerate(view.documents, start=1):
            self.line(
                f"{self.noun} {number}: {document.num_tokens:,} tokens at {document.start:,}, "
                f"{document.num_learned:,} learned",
                style="blue",
            )
            self._print(self._content(document, is_marked=view.chooses_targets))
        if view.num_padding:
            self.line(f"padding: {view.num_padding:,} tokens", style="dim")

    def _content(self, document: DocumentView, *, is_marked: bool) -> Text:
        """Lay out a document; without colours, learned text is enclosed in marks."""
        is_marked = is_marked and not self._in_colour
        content = Text(_GUTTER)
        was_learned, breaks = False, ""
        for number, run in enumerate(document.runs):
            if is_marked and was_learned and not run.learned:
                content.append(_CLOSE)
            content.append(breaks or ("" if number == 0 else self._separator))
            if is_marked and run.learned and not was_learned:
                content.append(_OPEN)
            text = self._spelled(run.text).replace("\n", f"{self._line_end}\n")
            if is_marked:
                text = text.replace(_OPEN, "\\" + _OPEN).replace(_CLOSE, "\\" + _CLOSE)
            text, ends_line = text.removesuffix("\n"), text.endswith("\n")
            content.append(text.replace("\n", f"\n{_GUTTER}"), style=_style(run))
            was_learned, breaks = run.learned, f"\n{_GUTTER}" if ends_line else ""
        return content.append(_CLOSE if is_marked and was_learned else "")

    def _spelled(self, text: str, keep: str = "\n") -> str:
        """Escape control characters, and characters that the terminal's encoding lacks."""
        encoding = self._console.encoding
        return printable(text, keep=keep).encode(encoding, "backslashreplace").decode(encoding)

    def _print(self, text: Text) -> None:
        if self._in_colour:
            self._console.print(text, soft_wrap=True)
        else:
            say(text.plain)


def _style(run: Run) -> str:
    if run.special:
        return "bold green underline" if run.learned else "magenta"
    return "green" if run.learned else "default"


def _totals_line(split: str, totals: Totals, noun: str) -> str:
    measured = "" if totals.num_measured == totals.num_sequences else f" (of {totals.num_measured:,} of them)"
    documents = totals.documents_per_sequence
    return (
        f"{split}: {totals.num_sequences:,} sequences of {totals.sequence_length:,} tokens{measured}: "
        f"{totals.learned_share:.1%} learned, {totals.padding_share:.2%} padding, "
        + (f"{noun} starts not recorded" if documents is None else f"{documents:.1f} {noun}s per sequence")
    )
