"""What attention's back end ``cute`` asks of flash-attn-4, with that package played by plain torch."""

from __future__ import annotations

import importlib
import os
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moescale.kernels.attention import Documents, _cute_attention, attention


def softmax(q, k, softmax_scale, left, sinks):
    """Probabilities of one document's queries and keys [S, N, D], and the logarithms of their sums [N, S].

    [N, S, S + 1]: the last key is the sink, whose score is minus infinity without one. A query sees ``left`` keys
    before its own, or all for None.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("snd,tnd->nst", q, k) * softmax_scale
    behind = torch.arange(len(q))[:, None] - torch.arange(len(q))
    scores = scores.masked_fill((behind < 0) | (behind > (len(q) if left is None else left)), float("-inf"))
    of_sinks = scores.new_full((len(scores),), float("-inf")) if sinks is None else sinks
    scores = torch.cat((scores, of_sinks[:, None, None].expand(-1, len(q), 1)), -1)
    return scores.softmax(-1), scores.logsumexp(-1)


def sequences(tensors, cu_seqlens_q):
    """One slice of each tensor per sequence."""
    if cu_seqlens_q is None:
        return zip(*(tensor.unbind() for tensor in tensors), strict=True)
    lengths = cu_seqlens_q.diff().tolist()
    assert sum(lengths) == len(tensors[0]) and min(lengths) == 0, "offsets close with the tokens, and are padded"
    return zip(*(tensor.split(lengths) for tensor in tensors), strict=True)


def joined(parts, cu_seqlens_q, dim=0):
    return torch.stack(parts) if cu_seqlens_q is None else torch.cat(parts, dim)


def check(tensors, causal, left, right, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    assert (causal, left, right) == (True, None, None) or (not causal and left >= 0 and right == 0)
    assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
    assert (cu_seqlens_q is None) == (max_seqlen_q is None)
    for tensor in tensors:
        assert tensor.is_contiguous() and tensor.dim() == (4 if cu_seqlens_q is None else 3)


def forward(
    q, k, v, *, softmax_scale, return_lse, learnable_sink, causal=False, window_size_left=None, window_size_right=None,
    cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
):  # fmt: skip
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    check((q, k, v), causal, window_size_left, window_size_right, *bounds)
    out, sums = [], []
    for one_q, one_k, one_v in sequences((q, k, v), cu_seqlens_q):
        probabilities, logarithms = softmax(one_q, one_k, softmax_scale, window_size_left, learnable_sink)
        one_v = one_v.repeat_interleave(one_q.shape[1] // one_v.shape[1], 1)
        out.append(torch.einsum("nst,tnd->snd", probabilities[..., :-1], one_v))
        sums.append(logarithms)
    assert return_lse
    return joined(out, cu_seqlens_q), joined(sums, cu_seqlens_q, dim=1), None, None, None


def backward(q, k, v, out, grad, sums, *, softmax_scale, learnable_sink, window_size_left=None, **options):
    cu_seqlens_q = options.get("cu_seqlens_q")
    again, expected = forward(
        q, k, v, softmax_scale=softmax_scale, return_lse=True, learnable_sink=learnable_sink,
        window_size_left=window_size_left, **options,
    )[:2]  # fmt: skip
    torch.testing.assert_close(sums, expected)
    torch.testing.assert_close(out, again)
    assert grad.is_contiguous()
    gradients, grad_sinks = [], 0.0
    for one_q, one_k, one_v, one_out, one_grad in sequences((q, k, v, out, grad), cu_seqlens_q):
        probabilities, _ = softmax(one_q, one_k, softmax_scale, window_size_left, learnable_sink)
        probabilities, of_sinks = probabilities[..., :-1], probabilities[..., -1:]
        row = (one_out * one_grad).sum(-1).t().unsqueeze(-1)
        heads = one_k.shape[1]
        k_of_q, v_of_q = (x.repeat_interleave(one_q.shape[1] // heads, 1) for x in (one_k, one_v))
        scores = probabilities * (torch.einsum("snd,tnd->nst", one_grad, v_of_q) - row) * softmax_scale
        grad_k = torch.einsum("nst,snd->tnd", scores, one_q).unflatten(1, (heads, -1)).sum(2)
        grad_v = torch.einsum("nst,snd->tnd", probabilities, one_grad).unflatten(1, (heads, -1)).sum(2)
        gradients.append((torch.einsum("nst,tnd->snd", scores, k_of_q), grad_k, grad_v))
        grad_sinks = grad_sinks - (of_sinks * row).sum((1, 2))
    joint = tuple(joined(parts, cu_seqlens_q) for parts in zip(*gradients, strict=True))
    return joint if learnable_sink is None else (*joint, grad_sinks)


@pytest.fixture
def package(monkeypatch, tmp_path):
    """flash-attn-4, as this file plays it."""
    modules = {name: ModuleType(name) for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")}
    modules["flash_attn.cute.interface"]._flash_attn_fwd = forward
    modules["flash_attn.cute.interface"]._flash_attn_bwd = backward
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "moescale.kernels.attention.cute", raising=False)
    monkeypatch.setattr(metadata, "version", lambda name: "4.0.0b36")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("ENABLED", "DIR"):  # recorded first, so that what the module sets is undone
        monkeypatch.setenv(f"FLASH_ATTENTION_CUTE_DSL_CACHE_{name}", "")
        monkeypatch.delenv(f"FLASH_ATTENTION_CUTE_DSL_CACHE_{name}")
    yield importlib.import_module("moescale.kernels.attention.cute")
    sys.modules.pop("moescale.kernels.attention.cute", None)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize(
    "key_heads, window, with_sinks", [(4, None, False), (2, None, False), (1, 3, True), (4, 1, True)]
)
def test_forward_and_backward_match_plain_torch(with_documents, compiled, key_heads, window, with_sinks):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 9, 4, 12), (2, 9, key_heads, 12), (2, 9, key_heads, 8))
    inputs = [torch.randn(shape, generator=generator).transpose(1, 2).contiguous().transpose(1, 2) for shape in shapes]
    inputs += [torch.randn(4, generator=generator)] if with_sinks else []
    inputs = [x.requires_grad_() for x in inputs]
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[0, 3], starts[0, 4], starts[1, 8] = True, True, True
    documents = Documents.from_starts(starts, torch.device("cpu")) if with_documents else None
    direction = torch.randn(2, 9, 4, 8, generator=generator)

    def cute(q, k, v, sinks=None):
        return _cute_attention(q, k, v, documents.offsets if documents else None, window, sinks, 0.3)[0] * 2

    def plain(q, k, v, sinks=None):
        return attention(q, k, v, softmax_scale=0.3, documents=documents, window=window, sinks=sinks) * 2

    run = torch.compile(cute, fullgraph=True, backend="aot_eager") if compiled else cute
    outs = (run(*inputs), plain(*inputs))
    for ours, expected in zip(*([out, *torch.autograd.grad(out, inputs, direction)] for out in outs), strict=True):
        torch.testing.assert_close(ours, expected)


def test_kernels_are_kept_in_the_users_own_folder(package, tmp_path):
    folder = Path(os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"])
    assert os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] == "1"
    assert folder.is_relative_to(tmp_path) and folder.stat().st_mode & 0o077 == 0


@pytest.mark.usefixtures("package")
def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "4.1.0")
    monkeypatch.delitem(sys.modules, "moescale.kernels.attention.cute")
    with pytest.raises(ImportError, match="version 4.1.0, tested is 4.0.0b36"):
        importlib.import_module("moescale.kernels.attention.cute")
