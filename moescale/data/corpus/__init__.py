"""Packed sequences on disk: the format of `prepare`, and datasets that `save_to_disk` wrote. Imports no torch."""

from moescale.data.corpus.corpus import Corpus, PreparedCorpus, open_corpus

__all__ = ["Corpus", "PreparedCorpus", "open_corpus"]
