"""Finds prompts in a corpus: the text before the first answer of a conversation, or the beginning of a document."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moescale.data.batch import NO_TARGET
from moescale.data.corpus import Corpus

PLAIN_PROMPT_TOKENS = 32
"""Length of the prompt, at most half of the document, if a document is learned from its beginning."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt and its continuation in the corpus."""

    sequence: int
    """Index of its sequence."""
    tokens: list[int]
    wanted: list[int]
    """The answer in the corpus: the learned tokens right after the prompt, or of plain text the rest of the
    document."""


def find_prompts(corpus: Corpus, number: int) -> list[Prompt]:
    """Return at most ``number`` prompts, of the first suitable document in each of evenly spaced sequences.

    The same in every call. A sequence that no prompt can be taken from, such as the inside of a long conversation that
    was split, gives way to the next one.
    """
    found: list[Prompt] = []
    total = corpus.num_sequences
    for place in range(min(number, total)):
        first, last = place * total // min(number, total), (place + 1) * total // min(number, total)
        prompts = (_prompt_of(corpus, index) for index in range(first, last))
        prompt = next((prompt for prompt in prompts if prompt is not None), None)
        if prompt is not None:
            found.append(prompt)
    return found


def _prompt_of(corpus: Corpus, index: int) -> Prompt | None:
    sequence = corpus.sequence(index)
    for start, end in sequence.documents():
        tokens = sequence.tokens[start:end].astype(np.int64)
        if len(tokens) < 2:
            continue
        if sequence.labels is None:
            cut = min(PLAIN_PROMPT_TOKENS, len(tokens) // 2)
            return Prompt(sequence=index, tokens=tokens[:cut].tolist(), wanted=tokens[cut:].tolist())
        learned = sequence.labels[start:end] != NO_TARGET
        if not learned[1:].any():
            continue
        cut = int(np.argmax(learned[1:])) + 1
        if learned[0]:  # it begins with what is learned, as plain text does
            cut = min(PLAIN_PROMPT_TOKENS, len(tokens) // 2)
        rest = np.flatnonzero(~learned[cut:])
        stop = cut + int(rest[0]) if rest.size else len(tokens)
        return Prompt(sequence=index, tokens=tokens[:cut].tolist(), wanted=tokens[cut:stop].tolist())
    return None
