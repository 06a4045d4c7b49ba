"""Launch parameters of the grouped GEMM kernels: tile shape, warps and pipeline depth, kept outside the kernels.

Tables per GPU lie in ``moescale/kernels/experts/tables``, found by ``moescale bench experts --tune``. A lookup never
runs a kernel: it takes the table entry of the GPU at hand that is nearest in rows per expert, or the default of the
architecture. So nothing is tuned at import or in a training step, and the same inputs always launch the same kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from importlib import resources
from typing import Any

import torch

from moescale.errors import ConfigError
from moescale.records import FileKind, build, parse_json_object

# The six products of an expert MLP, forward and backward, each with its own best launch.
KERNELS = ("up", "down", "down_dgrad", "up_dgrad", "up_wgrad", "down_wgrad")
# GEMMs of low-rank additions: onto the rank, and the gradients of the two factors (wide x rank, rank x wide).
LOW_RANK_KERNELS = ("project", "factor_wgrad", "projection_wgrad")
RANK_BLOCK = 16
"""Depth of the blocks in which a low-rank addition is multiplied: the least that tensor cores take, so that they find
room next to the pipeline."""
_FILE = FileKind(noun="a table of launches", remedy="write it again with `moescale bench experts --tune`")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How one grouped GEMM is cut into tiles and pipelined.

    ``block_m`` x ``block_n`` is the output tile (rows of an expert x output columns; for weight gradients both are
    weight dims), ``block_k`` the depth of one pipeline stage. ``flatten`` merges the tile loop with the loop over k, so
    that the loads of the next tile are in flight while a tile is stored. ``programs_per_sm`` programs share a
    multiprocessor; ``group_m`` row tiles are walked together for reuse in L2. A tile is stored in ``store_splits``
    (1, 2 or 4) parts: fewer columns at a time need less shared memory and fewer registers next to the pipeline.
    ``half_tiles`` computes nearly empty row tiles, and the last round of tiles, at half the height: see
    ``row_tiles_triton``; it has no effect on weight gradients.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 8
    num_stages: int = 3
    flatten: bool = True
    programs_per_sm: int = 1
    group_m: int = 1
    store_splits: int = 2
    half_tiles: bool = False

    def __post_init__(self) -> None:
        if self.store_splits not in (1, 2, 4):
            raise ConfigError(f"store_splits ({self.store_splits}) must be 1, 2 or 4")

    @property
    def store_n(self) -> int:
        """Columns of one store."""
        return self.block_n // self.store_splits


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedLaunch:
    """The launch found for one product: ``rows`` rows of ``num_experts`` experts with weights [n, k], in bf16."""

    kernel: str
    rows: int
    num_experts: int
    n: int
    k: int
    launch: LaunchConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchTable:
    """The tuned launches of one GPU model."""

    gpu: str
    entries: tuple[TunedLaunch, ...]

    def nearest(self, kernel: str, rows: int, num_experts: int, n: int, k: int) -> LaunchConfig | None:
        """Return the launch tuned for ``kernel`` at [n, k] nearest in rows per expert, then in experts (log scale).

        Without an entry of exactly this weight shape, the entries of the kernel's other shapes are used.
        """
        candidates = [e for e in self.entries if e.kernel == kernel and (e.n, e.k) == (n, k)]
        candidates = candidates or [e for e in self.entries if e.kernel == kernel]

        def distance(entry: TunedLaunch) -> tuple[float, float]:
            per_expert = math.log(max(rows, 1) / num_experts) - math.log(entry.rows / entry.num_experts)
            return round(abs(per_expert), 2), abs(math.log(num_experts / entry.num_experts))

        return min(candidates, key=distance).launch if candidates else None


def parse_table(document: dict[str, Any], origin: str = "table") -> LaunchTable:
    """Build a table from its JSON document ``{"gpu", "entries": [TunedLaunch as an object, ...]}``."""
    return build(LaunchTable, document, origin, _FILE)


@functools.cache
def load_tables() -> dict[str, LaunchTable]:
    """Return every shipped table by the GPU name that CUDA reports."""
    tables = {}
    folder = resources.files("moescale.kernels.experts").joinpath("tables")
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.name.endswith(".json"):
            table = parse_table(parse_json_object(file.read_text(), file.name, _FILE), file.name)
            tables[table.gpu] = table
    return tables


def default_launch(capability: tuple[int, int], dtype: torch.dtype) -> LaunchConfig:
    """Return a launch that compiles and runs decently on an architecture for which no table is shipped."""
    if dtype.itemsize == 4:
        return LaunchConfig(block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=2, flatten=False)
    if capability >= (9, 0):
        return LaunchConfig(block_m=128, block_n=256, block_k=64, num_stages=4)
    # Without the tensor copy engine, addresses cost registers; consumer Ampere and Ada have 100 KiB of shared memory.
    return LaunchConfig(block_m=128, block_n=128, block_k=32, num_stages=3)


def low_rank_launch(kernel: str, capability: tuple[int, int], dtype: torch.dtype, n: int, k: int) -> LaunchConfig:
    """Return the launch of one of ``LOW_RANK_KERNELS``: a tile no wider than the rank, which memory's rate limits.

    ``n``, ``k``: as of :func:`find_launch`; of weight gradients both are dims of the weight.
    """
    if dtype.itemsize == 4:
        return default_launch(capability, dtype)
    stages = 4 if capability >= (9, 0) else 3
    rank = k if kernel == "factor_wgrad" else n
    narrow = min(128, max(16, 2 ** (rank - 1).bit_length()))
    if kernel == "projection_wgrad":  # 64 rows are the least that Hopper's matrix instructions take
        return LaunchConfig(
            block_m=max(64, narrow), block_n=128, block_k=64, num_warps=4, num_stages=stages, flatten=False
        )
    return LaunchConfig(
        block_m=128,
        block_n=narrow,
        block_k=64,
        num_warps=4,
        num_stages=stages,
        flatten=False,
        programs_per_sm=2,
        store_splits=1,
    )


@functools.cache
def with_low_rank(launch: LaunchConfig, device: torch.device, rank: int) -> tuple[LaunchConfig, int]:
    """Return the launch for a kernel that multiplies a low-rank addition behind its main loop, and the depth of blocks.

    Narrower stores make room for the addition's operands: 220 of Hopper's 227 KiB with tiles of 128 x 256 and four
    stages. On Blackwell, Triton 3.6 compiles one further multiplication, outside a flattened loop: it takes the rank
    whole, in the room of a pipeline stage.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0):
        stages = max(2, min(launch.num_stages, 3))
        launch = dataclasses.replace(launch, store_splits=4, flatten=False, num_stages=stages)
        return launch, max(RANK_BLOCK, 2 ** (rank - 1).bit_length())
    return dataclasses.replace(launch, store_splits=4), RANK_BLOCK


@functools.cache
def with_bias(launch: LaunchConfig, device: torch.device) -> LaunchConfig:
    """Return the launch for a kernel that adds a bias behind its main loop.

    On Blackwell the bias is brought into the accumulator's layout through shared memory, in the room of a stage.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0):
        return dataclasses.replace(launch, num_stages=max(2, min(launch.num_stages, 3)))
    return launch


@functools.cache
def find_launch(
    kernel: str, device: torch.device, dtype: torch.dtype, rows: int, num_experts: int, n: int, k: int
) -> LaunchConfig:
    """Return the launch of ``kernel`` on ``device`` for ``rows`` rows of ``num_experts`` experts, weights [n, k]."""
    if device.type != "cuda":
        # The interpreter: small tiles, so that small tests meet tile edges.
        return LaunchConfig(
            block_m=16, block_n=32, block_k=16, num_warps=4, num_stages=1, flatten=False, half_tiles=True
        )
    if kernel in LOW_RANK_KERNELS:
        return low_rank_launch(kernel, torch.cuda.get_device_capability(device), dtype, n, k)
    table = load_tables().get(torch.cuda.get_device_name(device))
    if table is not None and dtype.itemsize == 2:
        launch = table.nearest(kernel, rows, num_experts, n, k)
        if launch is not None:
            return launch
    return default_launch(torch.cuda.get_device_capability(device), dtype)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of ``device``; 4 in the interpreter, so that programs loop over tiles."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
