"""Operators of the model, one file each: Triton kernel, autograd and plain-torch reference. Tensors in, tensors out.

May import: torch, triton, moescale.config, moescale.errors, moescale.plan. Never a layer above.
"""
