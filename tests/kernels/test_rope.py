"""Rotary positions and head layout of MLA: kernel against plain torch, and the meaning of the rotation."""

from __future__ import annotations

import pytest
import torch
from agreement import DEVICE, assert_accurate, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.kernels.backends import KernelInputError
from moescale.kernels.rope import mla_rope


def tables(length: int, rope_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(torch.arange(length), 0.7 ** torch.arange(rope_dim // 2)).to(DEVICE)
    return angles.cos(), angles.sin()


def inputs(
    batch: int, length: int, heads: int, nope: int, rope: int, value: int, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    q = randn(batch, length, heads, nope + rope, dtype=dtype)
    kv = randn(batch, length, heads, nope + value, dtype=dtype, seed=1)
    # As the model passes it: the last columns of a wider projection.
    k_rope = randn(batch, length, rope + 5, dtype=dtype, seed=2, grad=False)[..., 5:].requires_grad_()
    return [q, kv, k_rope, *tables(length, rope)]


def test_scores_depend_on_the_distance_only() -> None:
    length, rope = 6, 8
    q = randn(1, 1, 1, rope).expand(1, length, 1, rope)
    k_rope = randn(1, 1, rope, seed=1).expand(1, length, rope)
    kv = torch.zeros(1, length, 1, 3, device=DEVICE)
    q_out, k_out, _ = mla_rope(q, kv, k_rope, *tables(length, rope))
    scores = torch.einsum("bsnd,btnd->st", q_out, k_out)
    for distance in range(length):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_adjacent_elements_form_a_pair() -> None:
    q = torch.tensor([1.0, 2.0, 3.0, 4.0], device=DEVICE).view(1, 1, 1, 4)
    cos = torch.tensor([[0.0, 1.0]], device=DEVICE)
    sin = torch.tensor([[1.0, 0.0]], device=DEVICE)
    out, _, _ = mla_rope(q, torch.zeros(1, 1, 1, 2, device=DEVICE), q[:, :, 0], cos, sin)
    assert out.flatten().tolist() == [-2.0, 1.0, 3.0, 4.0]


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dims", [(2, 5, 3, 12, 4, 10), (1, 2, 16, 128, 64, 128), (1, 1, 1, 6, 6, 5)])
def test_kernel_agrees(dims: tuple[int, int, int, int, int, int]) -> None:
    assert_accurate(mla_rope, inputs(*dims))


SIZES = st.integers(1, 9)


@settings(max_examples=10, deadline=None)
@given(batch=st.integers(1, 2), length=st.integers(1, 4), heads=SIZES, nope=SIZES, pairs=st.integers(1, 5), value=SIZES)
def test_kernel_agrees_on_any_shape(batch: int, length: int, heads: int, nope: int, pairs: int, value: int) -> None:
    assert_accurate(mla_rope, inputs(batch, length, heads, nope, 2 * pairs, value))


def test_kernel_takes_gradients_in_any_memory_order() -> None:
    def in_attention_order(*tensors: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        return tuple(x.transpose(1, 2).clone(memory_format=torch.contiguous_format) for x in mla_rope(*tensors))

    assert_accurate(in_attention_order, inputs(2, 4, 3, 6, 4, 5))


def test_tables_of_another_length_are_refused() -> None:
    q, kv, k_rope, cos, sin = inputs(1, 4, 2, 4, 4, 4)
    with pytest.raises(KernelInputError, match=r"cos has shape \(3, 2\).*\(4, 2\)"):
        mla_rope(q, kv, k_rope, cos[:3], sin)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dims", [(4, 512, 16, 128, 64, 128), (1, 77, 5, 24, 10, 40)])
def test_bf16_error_is_at_most_twice_plain_torch(dims: tuple[int, int, int, int, int, int]) -> None:
    assert_accurate(mla_rope, inputs(*dims, dtype=torch.bfloat16))
