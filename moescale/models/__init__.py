"""Model families, a folder each, and what they share.

``family`` says what a family declares, ``registry`` lists them. These two and a family's ``hf`` and ``operators``
import no torch. ``transformer`` is the decoder that every family fills with its ``blocks``, in its ``model``.

May import: moescale.kernels, moescale.operators, moescale.config, moescale.errors.
"""
