"""Formats of weights, gradients and optimizer state, with their bytes; sizes of chunks on which memory depends.

Declared once for the plan, the planner that prices them and the kernels that compute with them. Imports no torch.
"""

from __future__ import annotations

from typing import Literal

ComputeFormat = Literal["bf16", "fp32"]
MomentFormat = Literal["fp32", "bf16", "int8"]
"""Both AdamW moments; int8 means 8-bit codes with block scales."""
MasterFormat = Literal["fp32", "bf16_remainder", "stochastic_bf16"]
"""What is kept of a bf16 weight's fp32 master: all of it, the 16 bits that bf16 rounds away, or nothing."""
GradientFormat = Literal["fp32", "bf16"]
FrozenFormat = Literal["compute", "fp8"]
"""Frozen weights of layers: in the compute dtype, or as e4m3 codes with a scale for every block."""
GemmFormat = Literal["compute", "fp8"]
"""Operands of GEMMs of weights that are trained: in the compute dtype, or quantised to e4m3 with a scale for every row
and weight. The weights themselves stay in the compute dtype."""

PLANNED_MOMENTS: tuple[MomentFormat, ...] = ("fp32", "bf16", "int8")
PLANNED_MASTERS: tuple[MasterFormat, ...] = ("fp32", "bf16_remainder", "stochastic_bf16")
PLANNED_GRADIENTS: tuple[GradientFormat, ...] = ("fp32", "bf16")
"""What the planner may choose, the most precise first: the formats that ``kernels.adamw`` can update, which a test
compares with these. A format that is only declared above is not planned yet."""
EXACT_MASTERS: tuple[MasterFormat, ...] = ("fp32", "bf16_remainder")
"""Those that together with the bf16 weight are the fp32 master."""

MOMENT_BLOCK = 128
"""Values of a row that share one fp32 scale in 8-bit moments."""

FP8_BLOCK = 128
"""Rows and columns of a frozen weight in fp8 that share one fp32 scale."""
FP8_COPY_ROWS = 128
"""To a multiple of which each expert's rows are padded in the transposed fp8 copy of its weight."""
FP8_GEMM_MULTIPLE = 16
"""Of which the dims of a weight are whose GEMMs are in fp8: rows of its copies begin at multiples of 16 bytes."""

DTYPE_BYTES = {"fp32": 4, "bf16": 2}
MOMENT_BYTES = {"fp32": 2 * 4.0, "bf16": 2 * 2.0, "int8": 2 * (1.0 + 4.0 / MOMENT_BLOCK)}
"""Both moments of one weight, scales included."""
MASTER_BYTES = {"fp32": 4.0, "bf16_remainder": 2.0, "stochastic_bf16": 0.0}
"""What is kept next to one bf16 weight."""

# A chunk's logits are 2 * V bytes a token: 419 MB at 2,048 tokens and a vocabulary of 102,400, as much as the weight's
# gradient, which every chunk reads, rounds and writes once. So small chunks cost time, and many of them accuracy: after
# four sums in bf16 the weight's gradient has 1.6 times the error of a single product, after sixteen 2.8 times.
LOGIT_CHUNK_TOKENS = 2048
MOST_LOGIT_CHUNKS = 4


def logit_chunk_tokens(num_tokens: int) -> int:
    """Return how many of a micro-batch's tokens have logits at one time."""
    return max(LOGIT_CHUNK_TOKENS, -(-num_tokens // MOST_LOGIT_CHUNKS))
