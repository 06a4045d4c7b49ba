"""Prompts of a corpus: up to the first answer of a conversation, or how a document begins."""

from __future__ import annotations

import numpy as np

from moescale.data.corpus.sequence import NO_TARGET, PackedSequence
from moescale.data.prompts import PLAIN_PROMPT_TOKENS, find_prompts


class FakeCorpus:
    """Sequences given as lists of documents, each a list of (token, is learned)."""

    def __init__(self, *sequences, padding=0, chooses=True, tells=True):
        self.sequences, self.num_padding, self.chooses, self.tells = sequences, padding, chooses, tells
        self.num_sequences = len(sequences)

    def sequence(self, index):
        pairs = [pair for document in self.sequences[index] for pair in document]
        tokens = np.array([token for token, _ in pairs], dtype=np.uint16)
        starts = np.zeros(len(tokens), dtype=bool)
        starts[np.cumsum([0, *map(len, self.sequences[index])])[:-1]] = True
        labels = np.array([token if learned else NO_TARGET for token, learned in pairs])
        padding = np.arange(len(tokens)) >= len(tokens) - self.num_padding
        return PackedSequence(tokens, starts if self.tells else None, labels if self.chooses else None, padding)


def turns(first: int, *learned: int):
    return [(first + place, bool(bit)) for place, bit in enumerate(learned)]


def test_a_prompt_of_a_conversation_ends_before_its_first_answer():
    corpus = FakeCorpus([turns(10, 0, 0, 1, 1, 0, 1), turns(30, 0, 1)])
    (prompt,) = find_prompts(corpus, 3)
    assert (prompt.sequence, prompt.tokens, prompt.wanted) == (0, [10, 11], [12, 13])


def test_what_has_no_answer_gives_way_to_the_next():
    corpus = FakeCorpus([turns(1, 0, 0)], [turns(10, 0, 0), turns(20, 0, 1, 1)], [turns(40, 0, 0)])
    (prompt,) = find_prompts(corpus, 1)
    assert (prompt.sequence, prompt.tokens, prompt.wanted) == (1, [20], [21, 22])
    assert [found.sequence for found in find_prompts(corpus, 3)] == [1]
    assert find_prompts(FakeCorpus([turns(1, 0, 0)]), 2) == []


def test_prompts_of_plain_text_are_beginnings_of_documents():
    document = turns(100, *[1] * 80)
    for corpus in (FakeCorpus([document], chooses=False, tells=False), FakeCorpus([document])):
        (prompt,) = find_prompts(corpus, 1)
        assert prompt.tokens == list(range(100, 100 + PLAIN_PROMPT_TOKENS))
        assert prompt.wanted == list(range(100 + PLAIN_PROMPT_TOKENS, 180))
    (short,) = find_prompts(FakeCorpus([turns(1, 1, 1, 1)], chooses=False), 1)
    assert (short.tokens, short.wanted) == ([1], [2, 3])


def test_padding_is_neither_a_prompt_nor_an_answer():
    corpus = FakeCorpus([turns(5, 0, 1, 1, 1)], padding=1)
    assert find_prompts(corpus, 1)[0].wanted == [6, 7]
    assert find_prompts(FakeCorpus([turns(5, 0, 1)], padding=2), 1) == []


def test_prompts_are_spread_over_the_corpus():
    corpus = FakeCorpus(*[[turns(index, 0, 1)] for index in range(12)])
    assert [prompt.sequence for prompt in find_prompts(corpus, 3)] == [0, 4, 8]
