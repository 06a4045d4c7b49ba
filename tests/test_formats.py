"""The bytes that the planner counts are those that the optimizer keeps."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from moescale.formats import (
    DTYPE_BYTES,
    LOGIT_CHUNK_TOKENS,
    MASTER_BYTES,
    MOMENT_BYTES,
    ComputeFormat,
    GradientFormat,
    MasterFormat,
    MomentFormat,
    logit_chunk_tokens,
)
from moescale.kernels.adamw import init_adamw_state


@pytest.mark.parametrize("master", get_args(MasterFormat))
@pytest.mark.parametrize("moments", get_args(MomentFormat))
def test_a_weights_bytes_are_those_of_its_state(moments, master):
    weight = torch.zeros(8, 256, dtype=torch.bfloat16)
    state = init_adamw_state(weight, moments, master)
    kept = sum(tensor.nbytes for tensor in state.tensors().values())
    assert kept == weight.numel() * (MOMENT_BYTES[moments] + MASTER_BYTES[master])


def test_every_format_has_its_bytes():
    assert set(get_args(ComputeFormat)) == set(get_args(GradientFormat)) == set(DTYPE_BYTES)
    assert set(get_args(MomentFormat)) == set(MOMENT_BYTES) and set(get_args(MasterFormat)) == set(MASTER_BYTES)


def test_few_tokens_are_one_chunk_and_many_are_four():
    assert logit_chunk_tokens(10) == LOGIT_CHUNK_TOKENS
    assert logit_chunk_tokens(40_000) == 10_000
