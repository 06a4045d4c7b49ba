"""Text to packed token sequences (prepare), and the resumable loader. No model, no runtime.

May import: moescale.config, moescale.errors.
"""
