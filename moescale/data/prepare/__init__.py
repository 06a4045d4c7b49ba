"""The `prepare` program: documents from files or the hub, tokenised, packed and written as a corpus.

``pipeline`` is the program; ``sources``, ``hub`` and ``readers`` find and read documents as ``work_items``, which
``workers`` hand to ``encode``; ``shard_writer`` and ``atomic_folder`` write. Imports no torch: its modules run in
spawned processes. May import: moescale.data.corpus.
"""

from moescale.data.prepare.pipeline import prepare
from moescale.data.prepare.settings import PrepareSettings

__all__ = ["PrepareSettings", "prepare"]
