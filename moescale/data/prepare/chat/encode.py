"""Rendered conversations to tokens, a target bit for each, and sequences that hold whole conversations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from moescale.data.prepare.chat.conversations import RecordFault
from moescale.data.prepare.chat.render_process import Renderer, RenderOptions
from moescale.data.prepare.unknown_text import INVALID_UTF8, UnknownText, is_encodable
from moescale.errors import DataError

TOO_LONG = "too_long"
_UNDECIDED = "spans_undecided"


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Options for turning conversations into sequences."""

    render: RenderOptions
    sequence_length: int
    too_long: str
    """'drop', 'split' or 'error': the treatment of conversations longer than a sequence."""


class EncodedConversation(NamedTuple):
    tokens: np.ndarray
    """[tokens]"""
    targets: np.ndarray
    """bool [tokens]: which of them are learned."""


class ChatEncoder:
    """Renders and tokenises conversations; one per process."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, dtype: np.dtype, options: ChatOptions, unknown: UnknownText
    ) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        # It adds no tokens here, but may leave the space at a token's beginning out of the token's characters.
        self._tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
        self._dtype = dtype
        self._options = options
        self._unknown = unknown
        self._renderer = Renderer(options.render)

    def __call__(self, record: Any, where: str) -> tuple[list[EncodedConversation], list[tuple[str, int, str]]]:
        """Return the parts of a conversation, most often one, and what was left out: kind, amount, detail.

        Raises:
            DataError: the template cannot be used; a conversation is too long, where that is to be an error.
        """
        rendering = self._renderer(record)
        if isinstance(rendering, RecordFault):
            if rendering.kind == _UNDECIDED:
                raise DataError(
                    f"{self._options.render.source.path}: what the assistant wrote cannot be told from this chat "
                    f"template for {where} ({rendering.detail}); mark it by {{% generation %}} and "
                    "{% endgeneration %} in a copy and give that as prepare.chat_template, or learn with "
                    "--loss-on last-answer or all"
                )
            return [], [(rendering.kind, 1, rendering.detail)]
        if not is_encodable(rendering.text):
            return [], [(INVALID_UTF8, 1, "")]
        encoding = self._tokenizer.encode(rendering.text, add_special_tokens=False)
        tokens = np.array(encoding.ids, dtype=self._dtype)
        targets = covered(np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2), rendering.spans)
        notes = [(kind, 1, detail) for kind, detail in rendering.notes]
        notes += self._unknown.faults(rendering.text, encoding.ids)
        length = self._options.sequence_length
        if len(tokens) > length:
            if self._options.too_long == "error":
                raise DataError(
                    f"{where}: a conversation has {len(tokens):,} tokens, more than prepare.sequence_length "
                    f"({length:,}); raise that, or choose --too-long drop or split"
                )
            if self._options.too_long == "drop":
                detail = f"it has {len(tokens):,} tokens; raise --sequence-length, or give --too-long split"
                return [], [*notes, (TOO_LONG, 1, detail)]
            notes.append(("too_long_and_split", 1, f"it has {len(tokens):,} tokens"))
        parts = [*_learnable(tokens, targets, length)]
        missing = -(-len(tokens) // length) - len(parts)
        if missing:
            notes.append(("no_answer", missing, "nothing in a part of it is to be learned"))
        return parts, notes


def _learnable(tokens: np.ndarray, targets: np.ndarray, length: int) -> Iterator[EncodedConversation]:
    """Yield the parts of a conversation that have something to learn; what comes first in a part is context alone."""
    for start in range(0, len(tokens), length):
        ours = targets[start : start + length].copy()
        ours[:1] = False
        if ours.any():
            yield EncodedConversation(tokens[start : start + length], ours)


def covered(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return which tokens have a character within a span.

    Args:
        offsets: int64 [tokens, 2], first and last character + 1 of each token.
        spans: ranges of characters.

    Returns: bool [tokens].
    """
    found = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        found |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return found
