"""Grouped-query attention: heads are normed and rotated in one pass where norms take each alone, else in two steps."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moescale.convert.hf_config import read_model_config
from moescale.kernels import normed_rope
from moescale.kernels.attention import attention
from moescale.kernels.rope import half_rope
from moescale.models.blocks.gqa import GroupedQueryAttention, rope_tables
from moescale.models.cache import LayerCache

LENGTH, HIDDEN, WIDTH = 7, 64, 16


def layer(all_heads_at_once: bool = False) -> tuple[GroupedQueryAttention, tuple[torch.Tensor, ...]]:
    """A small layer with weights of its own, and its input and tables."""
    name = "olmoe-1b-7b" if all_heads_at_once else "qwen3-30b-a3b"
    config = dataclasses.replace(
        read_model_config(name), hidden_size=HIDDEN, num_heads=4, num_key_value_heads=2, head_dim=WIDTH
    )
    module = GroupedQueryAttention(config, norms_all_heads_at_once=all_heads_at_once)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    x = torch.randn(2, LENGTH, HIDDEN, generator=generator)
    return module, (x, *rope_tables(config, LENGTH, torch.device("cpu")))


def gradients(module: GroupedQueryAttention, result: torch.Tensor) -> list[torch.Tensor]:
    return [result.detach(), *torch.autograd.grad(result.square().sum(), list(module.parameters()))]


@pytest.mark.parametrize("all_heads_at_once", [False, True])
def test_the_result_is_that_of_a_norm_and_a_rotation(all_heads_at_once: bool) -> None:
    module, (x, cos, sin) = layer(all_heads_at_once)

    def heads(norm: torch.nn.Module, projected: torch.Tensor) -> torch.Tensor:
        if all_heads_at_once:
            return half_rope(norm(projected).unflatten(-1, (-1, WIDTH)), cos, sin)
        return half_rope(norm(projected.unflatten(-1, (-1, WIDTH))), cos, sin)

    q, k = heads(module.q_norm, module.q_proj(x)), heads(module.k_norm, module.k_proj(x))
    v = module.v_proj(x).unflatten(-1, (-1, WIDTH))
    expected = module.output(attention(q, k, v, softmax_scale=WIDTH**-0.5).flatten(-2))
    ours, theirs = gradients(module, module(x, cos, sin)), gradients(module, expected)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_kernels_give_the_same_and_compile_without_a_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = layer()
    plain = gradients(module, module(*inputs))
    monkeypatch.setattr(normed_rope, "runs_triton", lambda *_: True)
    for run in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        for a, b in zip(gradients(module, run(*inputs)), plain, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("all_heads_at_once", [False, True])
def test_tokens_read_one_after_another_give_the_same(all_heads_at_once: bool) -> None:
    module, (x, cos, sin) = layer(all_heads_at_once)
    cache = LayerCache(LENGTH)
    parts = [slice(0, 4), *(slice(position, position + 1) for position in range(4, LENGTH))]
    with torch.no_grad():
        read = [module(x[:, part], cos[part], sin[part], cache=cache) for part in parts]
        torch.testing.assert_close(torch.cat(read, dim=1), module(x, cos, sin))
