from __future__ import annotations

from typing import Any

import pytest
import torch

from moescale.kernels import backends, router
from moescale.kernels import experts as experts_module
from moescale.models.blocks import gqa, mla
from moescale.models.blocks import moe as moe_module


@pytest.fixture
def gpu_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the model choose the operators it chooses on a GPU; under fake tensors none of them runs."""

    def triton(*args: Any, **kwargs: Any) -> str:
        return "triton"

    def cudnn_attention(q, k, v, *, softmax_scale, documents):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        result = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, scale=softmax_scale)
        return result[0].transpose(1, 2)

    monkeypatch.setattr(backends, "choose_backend", triton)
    monkeypatch.setattr(experts_module, "choose_experts_backend", triton)
    for block in (gqa, mla):
        monkeypatch.setattr(block, "attention", cudnn_attention)
    monkeypatch.setattr(moe_module, "router_logits", router._router_logits_op)
