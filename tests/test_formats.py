"""The bytes that the planner counts are those that the optimizer keeps."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from moescale.formats import (
    DTYPE_BYTES,
    EXACT_MASTERS,
    LOGIT_CHUNK_TOKENS,
    MASTER_BYTES,
    MOMENT_BYTES,
    PLANNED_GRADIENTS,
    PLANNED_MASTERS,
    PLANNED_MOMENTS,
    ComputeFormat,
    GradientFormat,
    MasterFormat,
    MomentFormat,
    logit_chunk_tokens,
)
from moescale.kernels.adamw import MASTERS, MOMENT_DTYPES, init_adamw_state
from moescale.kernels.backends import KernelInputError


@pytest.mark.parametrize("master", PLANNED_MASTERS)
@pytest.mark.parametrize("moments", PLANNED_MOMENTS)
def test_a_weights_bytes_are_those_of_its_state(moments, master):
    weight = torch.zeros(8, 256, dtype=torch.bfloat16)
    state = init_adamw_state(weight, moments, master)
    kept = sum(tensor.nbytes for tensor in state.tensors().values())
    assert kept == weight.numel() * (MOMENT_BYTES[moments] + MASTER_BYTES[master])


def test_every_format_has_its_bytes():
    assert set(get_args(ComputeFormat)) == set(get_args(GradientFormat)) == set(DTYPE_BYTES)
    assert set(get_args(MomentFormat)) == set(MOMENT_BYTES) and set(get_args(MasterFormat)) == set(MASTER_BYTES)


def test_the_planner_may_choose_what_the_optimizer_can_update_and_nothing_else():
    assert PLANNED_MOMENTS == tuple(MOMENT_DTYPES)
    assert PLANNED_MASTERS == MASTERS and set(EXACT_MASTERS) < set(MASTERS)
    assert set(PLANNED_GRADIENTS) == set(get_args(GradientFormat))


def test_a_format_without_an_update_is_refused_with_those_there_are():
    weight = torch.zeros(8, 256, dtype=torch.bfloat16)
    with pytest.raises(KernelInputError, match=r"adamw: moments \('fp4'\) must be one of fp32, bf16, int8"):
        init_adamw_state(weight, "fp4", "fp32")
    with pytest.raises(KernelInputError, match=r"adamw: master \('fp4'\) must be one of fp32, bf16_remainder"):
        init_adamw_state(weight, "fp32", "fp4")


def test_few_tokens_are_one_chunk_and_many_are_four():
    assert logit_chunk_tokens(10) == LOGIT_CHUNK_TOKENS
    assert logit_chunk_tokens(40_000) == 10_000
