"""Converts between Hugging Face folders and moescale models: configuration fields, tensor names and layouts.

May import: moescale.models, moescale.config, moescale.errors.
"""
