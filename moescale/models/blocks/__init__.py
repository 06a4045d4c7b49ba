"""Blocks that families share: attention, experts, norms, rotary positions, linear layers.

May import: moescale.kernels, moescale.config, moescale.errors.
"""
