"""Where a rank stands on every axis of a plan's mesh, and what it therefore reads, counts and writes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moescale.plan import MeshShape

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""From the outermost, whose neighbours are furthest apart, to the innermost, whose neighbours have adjacent ranks."""


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """The place of rank ``rank`` in ``mesh``.

    Ranks are numbered in row-major order over AXES. Experts are laid over ``dp_shard * cp`` as ``[edp, ep]``: ranks
    with the same ``edp`` hold different experts of one copy, those with the same ``ep`` the same experts.
    """

    mesh: MeshShape = MeshShape()
    rank: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.num_ranks, f"rank {self.rank} of {self.num_ranks}"

    @property
    def num_ranks(self) -> int:
        return math.prod(getattr(self.mesh, axis) for axis in AXES)

    def on(self, axis: str) -> int:
        """The place on one of AXES, from 0 to its size in the mesh."""
        inner = AXES[AXES.index(axis) + 1 :]
        stride = math.prod(getattr(self.mesh, name) for name in inner)
        return self.rank // stride % getattr(self.mesh, axis)

    @property
    def data_rank(self) -> int:
        """Which share of a step's sequences this rank works on. Its peers along tp, cp and pp work on the same."""
        return self.on("dp_replicate") * self.mesh.dp_shard + self.on("dp_shard")

    @property
    def num_data_ranks(self) -> int:
        return self.mesh.dp_replicate * self.mesh.dp_shard

    @property
    def stage(self) -> int:
        """Which of the ``pp`` pipeline stages, the first has the embedding."""
        return self.on("pp")

    @property
    def expert_rank(self) -> int:
        """Which share of a copy of the experts this rank holds."""
        return self._expert_place % self.mesh.ep

    @property
    def expert_data_rank(self) -> int:
        """Which copy of the experts in its scale unit this rank holds a share of."""
        return self._expert_place // self.mesh.ep

    @property
    def num_expert_data_ranks(self) -> int:
        return self.mesh.dp_shard * self.mesh.cp // self.mesh.ep

    @property
    def counts_tokens(self) -> bool:
        """Whether sums over tokens that the model computes, such as losses, are to include this rank's.

        Its peers along tp compute the same of the same tokens. Those along cp have other tokens of the same sequences,
        and those along pp other layers, so all of them count.
        """
        return self.on("tp") == 0

    @property
    def counts_batches(self) -> bool:
        """Whether sums over batches as they are read are to include this rank's: once for each data rank."""
        return self.on("tp") == self.on("cp") == self.stage == 0

    @property
    def writes_stage(self) -> bool:
        """Whether this rank writes what all ranks of its pipeline stage hold alike."""
        return all(self.on(axis) == 0 for axis in AXES if axis != "pp")

    @property
    def _expert_place(self) -> int:
        return self.on("dp_shard") * self.mesh.cp + self.on("cp")


ONE_DEVICE = Coordinates()


def data_parallel(num_ranks: int, rank: int) -> Coordinates:
    """The place of a rank among ``num_ranks`` that all work on different sequences."""
    return Coordinates(mesh=MeshShape(dp_shard=num_ranks), rank=rank)
