"""Text to packed token sequences, and sequences to batches. No model, no runtime.

- ``prepare/``: the program that tokenises and packs text. Nothing else here imports it.
- ``corpus/``: the format that it writes, and reading it or a saved dataset.
- ``loader``, ``batch``, ``shuffle``: batches for training, resumable at every step.

May import: moescale.config, moescale.errors.
"""
