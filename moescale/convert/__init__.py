"""Hugging Face <-> moescale: configuration fields, tensor names and layouts. Hugging Face spellings live here.

May import: moescale.models, moescale.config, moescale.errors.
"""
