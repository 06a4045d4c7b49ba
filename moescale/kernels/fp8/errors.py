"""What quantisation to e4m3 is off by, by operator and tensor: collected while a model runs forward and backward.

Operators call :func:`note` for every tensor that they quantise. It does nothing unless :func:`collecting` is active, so
a recorded graph holds nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from moescale.kernels.fp8.scaled import E4M3, LARGEST, Copies, Scaled

_SATURATED = LARGEST * (1 + 1 / 28)
"""From 464 on a number is nearer to what would follow 448."""


class Errors(NamedTuple):
    """Of one kind of tensor."""

    relative: float
    """The norm of the error over that of the tensor."""
    saturated: float
    """The share of numbers that were beyond the range, and were cut to 448."""
    underflowed: float
    """The share of numbers other than zero that became zero."""


class Collector:
    """Sums by name, on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, exact: torch.Tensor, scaled: Scaled) -> None:
        """Add a matrix [..., R, C] and its rows with scales [..., R], or all with one scale each [E]."""
        wanted = exact.float()
        scales = scaled.scales.view(-1, *(1,) * (wanted.dim() - 1))
        found = scaled.data.float() * scales
        parts = (
            (found - wanted).double().square().sum(),
            wanted.double().square().sum(),
            (wanted.abs() >= scales * _SATURATED).sum().double(),
            ((found == 0) & (wanted != 0)).sum().double(),
            wanted.new_tensor(wanted.numel(), dtype=torch.float64),
        )
        sums = torch.stack(parts)
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def errors(self) -> dict[str, Errors]:
        """By name what was collected."""
        found = {}
        for name, sums in self._sums.items():
            off, norm, saturated, underflowed, number = sums.tolist()
            found[name] = Errors((off / max(norm, 1e-300)) ** 0.5, saturated / number, underflowed / number)
        return found


_collector: Collector | None = None


@contextmanager
def collecting() -> Iterator[Collector]:
    """Collect from the operators of this process while the context lasts."""
    global _collector
    before, _collector = _collector, Collector()
    try:
        yield _collector
    finally:
        _collector = before


def is_collecting() -> bool:
    """Whether anybody asks."""
    return _collector is not None


def note(name: str, exact: Callable[[], torch.Tensor], scaled: Scaled, ends: torch.Tensor | None = None) -> None:
    """Collect the rows [R, C] that were quantised to ``scaled``; ``exact`` makes them as they were before.

    ``ends``: of the experts, behind whose last row nothing is written.
    """
    if _collector is None:
        return
    number = scaled.scales.numel() if ends is None else int(ends[-1])
    if number:
        _collector.add(name, exact()[:number], Scaled(scaled.data[:number], scaled.scales[:number]))


def note_of_experts(name: str, exact: torch.Tensor, rows: Scaled, ends: torch.Tensor) -> None:
    """Collect rows [R, C], sorted by expert, and what they become in the transposed copy, with a scale an expert."""
    note(name, lambda: exact, rows, ends)
    number = int(ends[-1])
    if _collector is None or not number:
        return
    scales = rows.scales[:number]
    expert = torch.searchsorted(ends, torch.arange(number, dtype=ends.dtype, device=ends.device), right=True)
    largest = torch.zeros(ends.numel(), device=ends.device).scatter_reduce_(0, expert, scales, "amax")[expert]
    values = rows.data[:number].float() * (scales / largest).unsqueeze(-1)
    _collector.add(f"{name}, transposed", exact[:number], Scaled(values.to(E4M3), largest))


def note_copies(name: str, weight: torch.Tensor, copies: Copies) -> None:
    """Collect a weight [E, N, K] or [N, K], one expert after the other: there is little memory beside a model."""
    if _collector is None:
        return
    for part, codes, scale in zip(weight.detach().view(copies.rows.shape), copies.rows, copies.scales, strict=True):
        _collector.add(name, part.unsqueeze(0), Scaled(codes.unsqueeze(0), scale.view(1)))
