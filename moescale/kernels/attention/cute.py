"""Causal attention in CuTe, from the package flash-attn-4: the back end ``cute`` (Hopper, bf16).

Documents are sequences of their own length there, so nothing is computed across them and no mask is kept. Called below
the package's documented interface, whose autograd function a compiled layer cannot hold; so its version is fixed.
"""

from __future__ import annotations

import os
import warnings
from importlib import metadata
from pathlib import Path

import torch

TESTED_VERSION = "4.0.0b36"  # as in pyproject.toml
if metadata.version("flash-attn-4") != TESTED_VERSION:
    raise ImportError(f"version {metadata.version('flash-attn-4')}, tested is {TESTED_VERSION}")


def _keep_kernels_on_disk() -> None:
    """Have compiled kernels kept in the user's own folder, as Triton's are; else every start compiles them."""
    if "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED" in os.environ:
        return
    try:
        folder = Path.home() / ".cache" / "moescale" / "flash-attn-4"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or none to write to
        return
    os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] = "1"
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder))


_keep_kernels_on_disk()

from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd  # noqa: E402

# Of the compiler, about an argument that the kernels of Hopper leave out.
warnings.filterwarnings("ignore", message="Argument aux_data .* cannot be converted", category=UserWarning)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor | None,
    window: int | None,
    sinks: torch.Tensor | None,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (result [B, S, N, Dv], fp32 logarithms of the sums: [B, N, S], with documents [N, B * S])."""
    operands = [_by_documents(x, offsets) for x in (q, k, v)]
    options = _mask(offsets, q.shape[1], window) | {"learnable_sink": sinks}
    result = _flash_attn_fwd(*operands, **options, softmax_scale=softmax_scale, return_lse=True)
    return result[0].view(*q.shape[:3], v.shape[-1]), result[1]


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    offsets: torch.Tensor | None,
    window: int | None,
    sinks: torch.Tensor | None,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k, v and the sinks, the last one empty without them."""
    operands = [_by_documents(x, offsets) for x in (q, k, v, out, grad)]
    options = _mask(offsets, q.shape[1], window) | {"learnable_sink": sinks}
    gradients = _flash_attn_bwd(*operands, sums, **options, softmax_scale=softmax_scale)
    grad_q, grad_k, grad_v = (g.view(x.shape) for g, x in zip(gradients[:3], (q, k, v), strict=True))
    return grad_q, grad_k, grad_v, q.new_empty(0) if sinks is None else gradients[3]


def _by_documents(x: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """[B, S, N, D] as it is, with documents as [B * S, N, D]."""
    return x.contiguous() if offsets is None else x.contiguous().flatten(0, 1)


def _mask(offsets: torch.Tensor | None, length: int, window: int | None) -> dict:
    """Which keys a query sees: those before it, ``window`` with its own; and where documents begin and end."""
    mask = {"causal": True} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    if offsets is None:
        return mask
    bounds = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": length, "max_seqlen_k": length}
    return mask | bounds
