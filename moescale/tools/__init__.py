"""Measurements of kernels on the GPU at hand: benchmarks against peers, search for launch parameters, timing.

May import: moescale.kernels and below. No kernel needs anything here.
"""
