"""What nnScaler's DeepSeek example publishes, with its source: ``published.toml``."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from moescale.records import FileKind, build, read_toml

_PATH = Path(__file__).with_name("published.toml")
_FILE = FileKind(noun="the reference's published figures", remedy="install moescale anew", whole_floats=True)


@dataclass(frozen=True, kw_only=True)
class PublishedStep:
    """A training step of the whole model."""

    gpus: int
    plan_gpus: int
    """GPUs that hold one copy of the weights."""
    tokens: int
    """Of one step, over all GPUs."""
    sequence_length: int
    seconds: float
    active_parameters: float
    """Of a token, as the source counts them for its MFU."""
    mfu: float

    def mfu_at(self, tokens_per_second_per_gpu: float, peak_flops_per_second: float) -> float:
        """Return the MFU as the source counts it: six FLOPs per active parameter and token, attention left out."""
        return 6 * self.active_parameters * tokens_per_second_per_gpu / peak_flops_per_second


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """The routed experts of one layer, with gate, up and down."""

    tokens: int
    """Before they are sent to experts."""
    num_experts: int
    forward_ms: float
    backward_ms: float
    mfu: float


@dataclass(frozen=True, kw_only=True)
class PublishedGroupedGemm:
    """The table of grouped GEMMs. R = tokens x top_k rows, H hidden, F intermediate size, E experts."""

    hidden_size: int
    intermediate_size: int
    top_k: int
    rows: tuple[PublishedRow, ...]

    def forward_flops(self, row: PublishedRow) -> float:
        """FLOPs of gate, up and down: 6 R H F. The backward has twice as many."""
        return 6.0 * row.tokens * self.top_k * self.hidden_size * self.intermediate_size

    def limit_ms(self, row: PublishedRow, flops_per_second: float, bytes_per_second: float) -> tuple[float, float]:
        """Return the least time of forward and backward: the longer of the FLOPs and of the bf16 bytes that must move.

        Forward: weights and rows are read, results written. Backward: the same are read with the results' gradients,
        and gradients of weights and rows are written. What lies between the GEMMs is not counted.
        """
        flops = self.forward_flops(row)
        weights = 2.0 * 3 * row.num_experts * self.hidden_size * self.intermediate_size
        rows = 2.0 * row.tokens * self.top_k * self.hidden_size
        return (
            1e3 * max(flops / flops_per_second, (weights + 2 * rows) / bytes_per_second),
            1e3 * max(2 * flops / flops_per_second, (2 * weights + 3 * rows) / bytes_per_second),
        )


@dataclass(frozen=True, kw_only=True)
class Published:
    """All that is published, and where."""

    source: str
    model: str
    gpu: str
    peak_flops_per_second: float
    """By which the MFU is counted."""
    step: PublishedStep
    grouped_gemm: PublishedGroupedGemm


@functools.cache
def read_published() -> Published:
    """Return the reference's published figures."""
    return build(Published, read_toml(_PATH, _FILE), str(_PATH), _FILE)
