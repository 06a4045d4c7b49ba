"""Packed sequences on disk: the format of `prepare`, and datasets that `save_to_disk` wrote. Imports no torch."""

from moescale.data.corpus.corpus import Corpus, PreparedCorpus, open_corpus, verify
from moescale.data.corpus.sequence import NO_TARGET, PackedSequence
from moescale.data.corpus.verification import Verification

__all__ = ["NO_TARGET", "Corpus", "PackedSequence", "PreparedCorpus", "Verification", "open_corpus", "verify"]
