"""Hugging Face <-> moescale: configuration fields, tensor names and layouts. The only place with Hugging Face spellings.

May import: moescale.model, moescale.config, moescale.errors.
"""
