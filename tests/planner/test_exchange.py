"""Sizes of the exchange through peers' memory against its buffers, and against what its backward allocates."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moescale.convert.hf_config import read_model_config
from moescale.formats import FP8_COPY_ROWS
from moescale.kernels.backends import triton_interpreted
from moescale.kernels.dispatch.buffers import ALIGNMENT_BYTES, ExchangeShape
from moescale.kernels.fp8.scaled import E4M3, Copies, Scaled
from moescale.planner.cluster import load_cluster
from moescale.planner.exchange import PeerExchange

LITE = read_model_config("deepseek-coder-v2-lite")
TOKENS = 2048
FP8 = pytest.mark.parametrize("in_fp8", [False, True], ids=["bf16", "fp8"])


def exchange(ranks: int, *, in_fp8: bool) -> PeerExchange:
    dims = {"n": TOKENS, "h": LITE.hidden_size, "f": LITE.expert_intermediate_size, "k": LITE.top_k}
    return PeerExchange.of(LITE, dims, ranks, 2, in_fp8=in_fp8)


@FP8
@pytest.mark.parametrize("ranks", [2, 8])
def test_a_rank_shows_its_peers_as_many_bytes_as_planned(ranks: int, in_fp8: bool) -> None:
    assert LITE.num_experts is not None
    shape = ExchangeShape(
        num_ranks=ranks,
        num_tokens=TOKENS,
        hidden_size=LITE.hidden_size,
        num_experts=LITE.num_experts,
        top_k=LITE.top_k,
        dtype=torch.bfloat16,
        in_fp8=in_fp8,
    )
    beyond = shape.num_bytes - exchange(ranks, in_fp8=in_fp8).symmetric_bytes()
    assert 0 <= beyond < ALIGNMENT_BYTES * len(shape.fields())


class Live(TorchDispatchMode):
    """The most bytes that tensors made in the context had at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and func.overloadpacket._qualified_op_name in (
            "aten::empty",
            "aten::new_empty",
        ):
            size = out.untyped_storage().nbytes()
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(out.untyped_storage(), self._free, size)
        return out

    def _free(self, size: int) -> None:
        self.bytes -= size


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def empty_rows(rows: int, columns: int, device: Any = None) -> Scaled:
    return Scaled(empty(rows, columns, dtype=E4M3), empty(rows, dtype=torch.float32))


def fp8_operators() -> SimpleNamespace:
    """Operators of ``kernels.fp8`` that allocate their results and compute nothing."""

    def transpose_rows(rows: Scaled, groups: Any, padded: Any) -> Scaled:
        tiles = groups.num_rows // FP8_COPY_ROWS + groups.num_experts
        return empty_rows(rows.data.shape[1], tiles * FP8_COPY_ROWS)

    return SimpleNamespace(
        empty_rows=empty_rows,
        group_rows=lambda ends, num_rows, expected_rows: SimpleNamespace(num_rows=num_rows, num_experts=ends.numel()),
        multiply_rows=lambda rows, weight, groups, n, out=None, **_: empty(len(rows.data), n) if out is None else out,
        swiglu_backward=lambda *args, out: out,
        pad_ends=torch.empty_like,
        transpose_rows=transpose_rows,
        weight_gradient=lambda left, right, padded, buffer: buffer,
    )


def operators() -> SimpleNamespace:
    """The same of ``kernels.experts``."""

    def multiply_up(rows: torch.Tensor, weight: torch.Tensor, groups: Any, **_: Any) -> tuple[torch.Tensor, None]:
        return empty(len(rows), weight.shape[1]), None

    return SimpleNamespace(
        group_rows=lambda ends, num_rows, expected_rows: None,
        multiply_up=multiply_up,
        multiply_down_dgrad=lambda *args, out: out,
        multiply_rows=lambda *args, out, **_: out,
        weight_gradient=lambda *args, buffer, kernel: buffer,
    )


@pytest.mark.skipif(not torch.cuda.is_available() and not triton_interpreted(), reason="needs Triton")
@FP8
@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "recomputed"])
def test_the_backward_of_the_experts_allocates_as_many_bytes_as_planned(ranks: int, in_fp8: bool, keeps: bool) -> None:
    from moescale.kernels.dispatch import fp8_mlp, mlp
    from moescale.kernels.dispatch.triton import RowOrder

    sizes = exchange(ranks, in_fp8=in_fp8)
    hidden, ffn, rows = sizes.hidden, sizes.intermediate, sizes.most_rows
    experts = sizes.num_experts // ranks
    ends, values = empty(experts, dtype=torch.int32), empty(rows, dtype=torch.float32)
    order = RowOrder(pair_row=ends, row_weights=values, slots=ends, ends=ends, kept_ends=ends, further_ends=ends)
    gate_up, down = empty(experts, 2 * ffn, hidden), empty(experts, hidden, ffn)
    pre = empty(sizes.saved_rows if keeps else 0, 2 * ffn)
    out = empty(rows, hidden)
    options: dict[str, Any] = dict(expected_rows=sizes.pairs, out=out, values=values)
    backward: Callable[[], Any]
    if in_fp8:
        copies = [Copies(empty(*w.shape, dtype=E4M3), empty(1, dtype=E4M3), empty(experts)) for w in (gate_up, down)]

        def backward() -> None:
            given = empty_rows(rows, hidden), empty_rows(rows, hidden)
            fp8_mlp.backward_rows(fp8_operators(), *given, pre, *copies, order, buffers=(gate_up, down), **options)
    else:

        def backward() -> None:
            given = empty(rows, hidden), empty(rows, hidden)
            options.update(gate_up_gradient=gate_up, down_gradient=down)
            mlp.backward_rows(operators(), *given, pre, gate_up, down, order, **options)

    with Live() as live:
        backward()
    assert live.peak == pytest.approx(sizes.backward_bytes(keeps_pre_activation=keeps), rel=5e-3)
    assert live.bytes == 0


def test_half_the_bytes_are_read_from_peers_in_fp8_and_results_come_back_whole() -> None:
    cluster = dataclasses.replace(load_cluster("h100-sxm"), memory_bytes_per_second=1e30)
    whole, half = (exchange(2, in_fp8=in_fp8).pass_seconds(cluster) for in_fp8 in (False, True))
    link, token = cluster.peer_reads, TOKENS * LITE.hidden_size * 2
    pulled = token * (1 - 1 / 2**LITE.top_k) / link.bytes_per_second
    assert whole[0] - half[0] == pytest.approx(pulled / 2)
    assert whole[1] - half[1] == pytest.approx(2 * pulled / 2)
