"""Classifies the kernels of a training step by their names."""

from __future__ import annotations

import re

KINDS: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl|symmetric_memory|barrier_kernel|_pull_|_publish_|_shifts_kernel|Memcpy PtoP"),
    ("sharding copies", r"split_with_sizes_copy|chunk_cat"),
    ("rows to fp8", r"_quantize_rows_kernel"),  # of experts and of linear layers
    ("fp8 copies", r"_copies_kernel"),
    ("experts", r"_rows_kernel|_weight_gradient_kernel|_up_kernel|_swiglu_(backward_)?kernel|quack|grouped"),
    ("experts", r"_transpose_kernel|_expert_scales_kernel|_padded_ends_kernel"),
    ("gather and combine", r"_gather_kernel|_combine_kernel|_sort|_count_kernel"),
    ("optimizer", r"_adamw_kernel|LpNorm|lpnorm|FillFunctor<c10::BFloat16>|multi_tensor_apply"),
    ("attention", r"cudnn|flash_attn|flash_fwd|flash_bwd|fmha|_attention|attention_(forward|backward|delta)_"),
    ("dense GEMMs", r"nvjet|splitK|gemm|cutlass"),
    ("loss", r"_softmax_kernel|_scale_kernel|cross_entropy"),
    ("element-wise", r"_forward_kernel|_backward_kernel|reduce_kernel|triton_|elementwise|CUDAFunctor_add|copy|memcpy"),
)
"""Kinds with their patterns; the first match counts. Norms, RoPE and kernels of torch.compile are element-wise."""
OTHER = "other"


def kind_of(kernel: str) -> str:
    """Return the kind of the kernel with this name; ``other`` if no pattern matches."""
    return next((name for name, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE)), OTHER)
