"""Cluster files: what a GPU and its links can do, as TOML. Every figure says whether it was measured or published.

A file has one table per aspect; ``[sources]`` names, for each field, where its value is from. ``moescale calibrate``
writes the same format, so correcting the planner's constants needs no change of code.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moescale.config import fingerprint
from moescale.errors import ConfigError, nearest
from moescale.records import FileKind, build, parse_toml, read_toml

SHIPPED = Path(__file__).parent / "clusters"
_FILE = FileKind(
    noun="a cluster file",
    remedy="correct it, or measure the machine with `moescale calibrate`",
    missing="missing; give the path of a cluster file, or write one with `moescale calibrate`",
    whole_floats=True,
)
MIN_SUSTAINED_CLOCK = 0.6
"""0.84 to 0.87 were measured; a busy neighbour once gave 0.33."""
MAX_ALLOCATOR_SLACK = 0.5
BF16_RATES = ("dense_gemm", "grouped_gemm", "attention")
FP8_RATES = ("fp8_dense_gemm", "fp8_grouped_gemm")
"""Tables that a file can do without."""
FP8_SPEEDUP = 2
"""Dense fp8 rate of data sheets over that of bf16."""
MAY_BE_ZERO = (
    *("allocator_slack", "context_bytes", "launch_seconds", "step_overhead_seconds", "nccl_bytes", "margin_bytes"),
    *("host_layer_seconds", "host_sharding_seconds", "host_exchange_seconds", "overlap_cost"),
)
"""Figures that a machine can do without."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """An alpha-beta model of what one GPU sends to others."""

    latency_seconds: float
    """Of one message."""
    bytes_per_second: float
    """One direction, per GPU."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """A rate as a function of a size, linear in its logarithm between the points given, constant outside."""

    sizes: tuple[float, ...]
    flops_per_second: tuple[float, ...]

    def at(self, size: float) -> float:
        """The rate at ``size``, in FLOP/s."""
        if size <= self.sizes[0]:
            return self.flops_per_second[0]
        if size >= self.sizes[-1]:
            return self.flops_per_second[-1]
        right = bisect.bisect_left(self.sizes, size)
        low, high = self.sizes[right - 1], self.sizes[right]
        share = math.log(size / low) / math.log(high / low)
        return self.flops_per_second[right - 1] * (1 - share) + self.flops_per_second[right] * share


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One kind of GPU, and as many of them as a plan asks for."""

    name: str
    gpu: str
    gpus_per_node: int
    memory_bytes: int
    """Of one GPU, as the driver reports it."""
    host_memory_bytes: int
    """Per GPU."""
    peak_flops_per_second: float
    """Dense bf16 rate of the data sheet."""
    sustained_clock: float
    """Rate under continuous load over that of a short benchmark: power and heat lower the clock."""
    memory_bytes_per_second: float
    """Of a copy: bytes read and written."""
    elementwise_bytes_per_second: float
    optimizer_bytes_per_second: float
    launch_seconds: float
    """Time an operator takes beyond its work, per kernel."""
    step_overhead_seconds: float
    """Per step, whatever its size: the last kernels' tail, reading the loss."""
    allocator_slack: float
    """Fraction of activations and temporary buffers lost to fragmentation."""
    context_bytes: int
    """Taken by the CUDA context and libraries before the first tensor."""
    dense_gemm: Rates
    """By FLOPs of one product."""
    grouped_gemm: Rates
    """By rows per expert, forward and backward together: the products with what is fused into them."""
    attention: Rates
    """By sequence length, forward and backward together."""
    intra_node: Link
    inter_node: Link
    host: Link
    sources: dict[str, str]
    exchange: Link | None = None
    """Scattered reads of a peer GPU's rows in a node; the latency is that of a barrier. None: as ``intra_node``."""
    fp8_dense_gemm: Rates | None = None
    """As ``dense_gemm``, of operands in e4m3 and without quantising them. None: the GPU has no fp8, or none was
    measured, and so with the next."""
    fp8_grouped_gemm: Rates | None = None
    """As ``grouped_gemm``, of operands in e4m3: with quantising and transposing rows, without copies of weights."""
    host_layer_seconds: float = 10e-3
    """In which the host launches a layer's forward and backward one kernel at a time, where the micro-batch is not a
    CUDA graph. The defaults of the three were measured on two H100 with nine layers of DeepSeek-Coder-V2-Lite and 4,096
    tokens: 90 ms a micro-batch on one GPU without a graph, 130 ms with FSDP2, 153 ms with FSDP2 and all-to-alls."""
    host_sharding_seconds: float = 4.4e-3
    """What FSDP2 adds to that for each layer."""
    host_exchange_seconds: float = 2.6e-3
    """What an all-to-all between experts adds to that for each layer."""
    overlap_cost: float = 0.7
    """Seconds that computation loses to a second of a collective beside it: they share multiprocessors and memory. The
    default was measured with FSDP2 on two H100: 0.66 with nine layers of DeepSeek-Coder-V2-Lite, 0.7 with eight of
    Qwen3-30B-A3B beyond what they miss on one GPU."""
    nccl_bytes: int = 2**30
    """Buffers of a rank's communicators; the default was measured on two H100."""
    margin_bytes: int = 2 * 2**30
    """What a plan for several GPUs leaves free on each. That close to the limit torch's allocator frees and asks again,
    with steps five times as slow, before it fails. On one GPU, plans within 0.5% of the memory ran at full speed."""

    @property
    def peer_reads(self) -> Link:
        """The link of the exchange between experts inside a node."""
        return self.exchange or self.intra_node

    def fingerprint(self) -> str:
        """Changes with every figure, not with what is said of its source.

        Rates of fp8 are left out: shipped files gained them when plans already named those files.
        """
        values = dataclasses.asdict(self)
        for name in ("sources", *FP8_RATES):
            values.pop(name)
        for field in dataclasses.fields(self):  # so that files from before a field keep the fingerprint they had
            if (
                field.name in values
                and field.default is not dataclasses.MISSING
                and getattr(self, field.name) == field.default
            ):
                values.pop(field.name)
        return fingerprint(values)


def load_cluster(name: str) -> Cluster:
    """Read a shipped cluster by name, or a file by path. Raises ConfigError naming file and field."""
    path = Path(name)
    if path.suffix != ".toml":
        path = SHIPPED / f"{name}.toml"
        if not path.is_file():
            known = sorted(p.stem for p in SHIPPED.glob("*.toml"))
            raise ConfigError(
                f"cluster '{name}' is not known; use one of {', '.join(known)}, or a .toml file{nearest(name, known)}"
            )
    return parse_cluster(read_toml(path, _FILE), str(path))


def parse_cluster_text(text: str, path: str) -> Cluster:
    """Build a cluster from TOML; ``path`` names it in errors. Raises ConfigError."""
    return parse_cluster(parse_toml(text, path, _FILE), path)


def parse_cluster(document: dict[str, Any], path: str) -> Cluster:
    """Build a cluster from a TOML document; ``path`` names it in errors. Raises ConfigError."""
    cluster = build(Cluster, document, path, _FILE)
    for rates in (*BF16_RATES, *FP8_RATES):
        table: Rates | None = getattr(cluster, rates)
        if table is None:
            continue
        if not table.sizes or len(table.sizes) != len(table.flops_per_second):
            raise ConfigError(f"{path}: {rates} needs as many flops_per_second as sizes, and at least one")
        if min(table.sizes) <= 0:
            raise ConfigError(f"{path}: {rates}.sizes ({min(table.sizes)}) must be positive")
        if list(table.sizes) != sorted(set(table.sizes)):
            raise ConfigError(f"{path}: {rates}.sizes must increase")
        if min(table.flops_per_second) <= 0:
            raise ConfigError(f"{path}: {rates}.flops_per_second must be positive")
    for field in dataclasses.fields(Cluster):
        value = getattr(cluster, field.name)
        if isinstance(value, int | float) and (value < 0 or (value == 0 and field.name not in MAY_BE_ZERO)):
            raise ConfigError(f"{path}: {field.name} ({value}) must be positive")
    for name in ("intra_node", "inter_node", "host", "exchange"):
        link: Link | None = getattr(cluster, name)
        if link is None:
            continue
        if link.bytes_per_second <= 0:
            raise ConfigError(f"{path}: {name}.bytes_per_second ({link.bytes_per_second}) must be positive")
        if link.latency_seconds < 0:
            raise ConfigError(f"{path}: {name}.latency_seconds ({link.latency_seconds}) must not be negative")
    if cluster.overlap_cost > 1:
        raise ConfigError(
            f"{path}: overlap_cost ({cluster.overlap_cost}) must be at most 1: nothing else is gained then"
        )
    if not 0 < cluster.sustained_clock <= 1:
        raise ConfigError(f"{path}: sustained_clock ({cluster.sustained_clock}) must be above 0 and at most 1")
    _check_plausible(cluster, path)
    return cluster


def _check_plausible(cluster: Cluster, path: str) -> None:
    """Refuse figures that no machine has: what a measurement on a busy one gives."""
    remedy = "measure again on a machine that nobody else uses"
    if cluster.sustained_clock < MIN_SUSTAINED_CLOCK:
        raise ConfigError(
            f"{path}: sustained_clock ({cluster.sustained_clock}) must be at least {MIN_SUSTAINED_CLOCK}: power and "
            f"heat lower a GPU's clock by a quarter at most; {remedy}"
        )
    for name in (*BF16_RATES, *FP8_RATES):
        rates: Rates | None = getattr(cluster, name)
        factor, words = (FP8_SPEEDUP, f"{FP8_SPEEDUP} times ") if name in FP8_RATES else (1, "")
        fastest = 0.0 if rates is None else max(rates.flops_per_second)
        if fastest > 1.05 * factor * cluster.peak_flops_per_second:
            raise ConfigError(
                f"{path}: {name}.flops_per_second ({fastest:.4g}) must not exceed {words}peak_flops_per_second "
                f"({cluster.peak_flops_per_second:.4g}); correct one of the two, or {remedy}"
            )
    if cluster.allocator_slack > MAX_ALLOCATOR_SLACK:
        raise ConfigError(
            f"{path}: allocator_slack ({cluster.allocator_slack}) must be at most {MAX_ALLOCATOR_SLACK}: a fraction of "
            "temporary memory, 0.04 on the GPUs measured"
        )
