"""The parts of :mod:`moescale.kernels.fp8` as Triton kernels."""

from moescale.kernels.experts.row_tiles_triton import group_rows
from moescale.kernels.experts.sort_triton import sort_pairs
from moescale.kernels.experts.triton import combine_rows, order_by_pair, sort_weights
from moescale.kernels.fp8.gemm_triton import multiply_rows, weight_gradient
from moescale.kernels.fp8.mlp_triton import gated_backward, gated_forward
from moescale.kernels.fp8.norm_triton import gather_scaled
from moescale.kernels.fp8.quantize_triton import (
    empty_rows,
    gather_rows,
    pad_ends,
    quantize_rows,
    swiglu,
    swiglu_backward,
    transpose_rows,
    write_copies,
)

__all__ = [
    "combine_rows",
    "empty_rows",
    "gated_backward",
    "gated_forward",
    "gather_rows",
    "gather_scaled",
    "group_rows",
    "multiply_rows",
    "order_by_pair",
    "pad_ends",
    "quantize_rows",
    "sort_pairs",
    "sort_weights",
    "swiglu",
    "swiglu_backward",
    "transpose_rows",
    "weight_gradient",
    "write_copies",
]
