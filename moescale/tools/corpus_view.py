"""Sequences of a corpus as a user wants to see them: their documents as text, what is learned, what is padding.

Whatever can be trained on can be viewed. Without a tokenizer tokens are shown as ids. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moescale.data.corpus import NO_TARGET, Corpus, PackedSequence, open_corpus
from moescale.data.corpus.manifest import recorded_origin
from moescale.data.prepare.tokenizer import CorpusTokenizer, load_recorded_tokenizer
from moescale.errors import ConfigError, DataError, MoescaleError

DEFAULT_FIRST = 3
_MOST_MEASURED = 1000
"""Sequences that totals are taken from; of a larger corpus evenly spaced ones."""
_CONTEXT_TOKENS = 4
"""What a run is decoded after: decoders treat the beginning of a text differently, and a token may be part of a
character, of at most four bytes."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Neighbouring tokens of a document of which the same is true."""

    text: str
    """Their text; of tokens without one, or without a tokenizer, their ids."""
    learned: bool
    special: bool


@dataclass(frozen=True, kw_only=True)
class DocumentView:
    """A document, or all of a sequence where the corpus does not tell where documents start."""

    start: int
    """Position of its first token in the sequence."""
    num_tokens: int
    num_learned: int
    runs: list[Run]


@dataclass(frozen=True, kw_only=True)
class SequenceView:
    """One sequence."""

    index: int
    tokens: list[int]
    documents: list[DocumentView]
    chooses_targets: bool
    """Whether the corpus says which tokens are learned; if not, all are but the first of a document."""
    num_learned: int
    num_relabelled: int
    """Of those learned, how many are learned as another token than they are."""
    num_padding: int


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What a split amounts to."""

    num_sequences: int
    sequence_length: int
    num_measured: int
    """Sequences that the following is taken from: all, or some that are evenly spaced."""
    learned_share: float
    """Of all positions."""
    padding_share: float
    documents_per_sequence: float | None
    """None where the corpus does not tell where documents start."""


class CorpusView:
    """A split of a corpus and, where it is known, its tokenizer."""

    def __init__(self, data: Path, *, split: str = "train", tokenizer: str | None = None) -> None:
        """Open ``data``; ``tokenizer`` as ``prepare`` takes it, by default the one that the manifest names.

        Raises:
            DataError: there is no such corpus or split, it is damaged, or was made with another tokenizer.
        """
        self.corpus: Corpus = open_corpus(data, split)
        made_from = recorded_origin(data)
        self.holds_conversations = made_from.get("format") == "chat"
        self.notice: str | None = None
        """Why ids are shown instead of text."""
        self._tokenizer: CorpusTokenizer | None = None
        name = tokenizer or made_from.get("tokenizer")
        if not isinstance(name, str):
            self.notice = "the corpus does not say which tokenizer it was made with; give it as --tokenizer"
            return
        try:
            self._tokenizer = load_recorded_tokenizer(name, made_from, data)
        # The name in a manifest may be anything: too long for a path, the home folder of nobody.
        except (MoescaleError, OSError, RuntimeError) as error:
            if tokenizer is not None:
                raise
            self.notice = f"{error}; where the tokenizer is elsewhere, give it as --tokenizer"

    @property
    def has_text(self) -> bool:
        return self._tokenizer is not None

    def sequence(self, index: int) -> SequenceView:
        """View a sequence. Raises DataError where it holds an id outside the vocabulary."""
        sequence = self.corpus.sequence(index)
        tokens = sequence.tokens.astype(np.int64)
        wrong = np.flatnonzero((tokens < 0) | (tokens >= self.corpus.vocabulary_size))
        if wrong.size:
            raise DataError(
                f"{self.corpus.name}: sequence {index} has id {tokens[wrong[0]]} at token {wrong[0]}, outside the "
                f"corpus's vocabulary of {self.corpus.vocabulary_size:,}: it is damaged; prepare the corpus again"
            )
        learned = learned_tokens(sequence)
        documents = [
            DocumentView(
                start=start,
                num_tokens=end - start,
                num_learned=int(learned[start:end].sum()),
                runs=self._runs(tokens[start:end], learned[start:end]),
            )
            for start, end in sequence.documents()
        ]
        relabelled = 0 if sequence.labels is None else int((sequence.labels[learned] != tokens[learned]).sum())
        return SequenceView(
            index=index,
            tokens=tokens.tolist(),
            documents=documents,
            chooses_targets=sequence.labels is not None,
            num_learned=int(learned.sum()),
            num_relabelled=relabelled,
            num_padding=_num_padding(sequence),
        )

    def totals(self) -> Totals:
        """Measure the split."""
        corpus = self.corpus
        num_measured = min(corpus.num_sequences, _MOST_MEASURED)
        learned = padded = documents = 0
        for number in range(num_measured):
            index = number * corpus.num_sequences // num_measured
            sequence = corpus.sequence(index)
            learned += int(learned_tokens(sequence).sum())
            padded += _num_padding(sequence)
            documents += len(sequence.documents())
        positions = num_measured * corpus.sequence_length
        return Totals(
            num_sequences=corpus.num_sequences,
            sequence_length=corpus.sequence_length,
            num_measured=num_measured,
            learned_share=learned / positions,
            padding_share=padded / positions,
            documents_per_sequence=documents / num_measured if corpus.document_boundaries else None,
        )

    def _runs(self, tokens: np.ndarray, learned: np.ndarray) -> list[Run]:
        special = self._special(tokens)
        cuts = np.flatnonzero((np.diff(learned) != 0) | (np.diff(special) != 0)) + 1
        bounds = [0, *cuts.tolist(), len(tokens)]
        return [
            Run(
                text=self._text(tokens, start, end, special=bool(special[start])),
                learned=bool(learned[start]),
                special=bool(special[start]),
            )
            for start, end in zip(bounds, bounds[1:], strict=False)
        ]

    def _special(self, tokens: np.ndarray) -> np.ndarray:
        """Which tokens are no piece of text, bool [tokens]: special ones, and ids that the tokenizer has none for."""
        if self._tokenizer is None:
            return np.zeros(len(tokens), dtype=bool)
        added = self._tokenizer.tokenizer.get_added_tokens_decoder()
        ids = [
            number
            for number in np.unique(tokens).tolist()
            if (number in added and added[number].special) or self._tokenizer.tokenizer.id_to_token(number) is None
        ]
        return np.isin(tokens, ids)

    def _text(self, tokens: np.ndarray, start: int, end: int, *, special: bool) -> str:
        """Return the text of tokens from ``start`` to ``end`` of a document; a character cut there goes to the next."""
        if self._tokenizer is None:
            return " ".join(map(str, tokens[start:end].tolist()))
        tokenizer = self._tokenizer.tokenizer
        if special:
            names = [(number, tokenizer.id_to_token(number)) for number in tokens[start:end].tolist()]
            return "".join(f"<id {number}>" if name is None else name for number, name in names)
        first = max(0, start - _CONTEXT_TOKENS)
        before = tokenizer.decode(tokens[first:start].tolist(), skip_special_tokens=False).rstrip("\ufffd")
        whole = tokenizer.decode(tokens[first:end].tolist(), skip_special_tokens=False)
        if not whole.startswith(before):
            before, whole = "", tokenizer.decode(tokens[start:end].tolist(), skip_special_tokens=False)
        text = whole[len(before) :]
        return text if end == len(tokens) else text.rstrip("\ufffd")


def chosen(view: CorpusView, first: int | None, sequences: tuple[int, ...]) -> list[int]:
    """Return the indices of the sequences asked for. Raises ConfigError."""
    most = view.corpus.num_sequences
    if first is not None and sequences:
        raise ConfigError(f"show.first ({first}) and show.sequence ({sequences[0]}) exclude each other; drop one")
    if first is not None and first < 1:
        raise ConfigError(f"show.first ({first}) must be at least 1; leave it out for {DEFAULT_FIRST}")
    for index in sequences:
        if not 0 <= index < most:
            raise ConfigError(
                f"show.sequence ({index}) must be from 0 to {most - 1}: {view.corpus.name} has {most:,} sequences"
            )
    return list(sequences) or list(range(min(most, first or DEFAULT_FIRST)))


def learned_tokens(sequence: PackedSequence) -> np.ndarray:
    """Which tokens are predicted from those before them, bool [S]: the first of a document follows nothing."""
    learned = (
        np.ones(len(sequence.tokens), dtype=bool) if sequence.labels is None else np.array(sequence.labels != NO_TARGET)
    )
    learned[0] = False
    if sequence.document_starts is not None:
        learned[sequence.document_starts] = False
    return learned


def _num_padding(sequence: PackedSequence) -> int:
    return 0 if sequence.padding is None else int(sequence.padding.sum())
