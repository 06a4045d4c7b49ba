"""What a search found: a candidate with its price, the plan, why others lost, what exceeds which limit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moescale.config import ModelConfig
from moescale.errors import ConfigError
from moescale.plan import FSDP_AXES, ParallelPlan, Prediction
from moescale.planner.cluster import Cluster
from moescale.planner.cost import StepTime
from moescale.planner.memory import PeakMemory
from moescale.planner.request import Candidate, PlanRequest, decision_text
from moescale.planner.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A candidate with what it would cost."""

    candidate: Candidate
    time: StepTime
    memory: PeakMemory
    host_bytes: float
    supported: bool

    @property
    def decisions(self) -> dict[str, Any]:
        return self.candidate.decisions()


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """What a search found."""

    request: PlanRequest
    config: ModelConfig
    workload: Workload
    """The operators that the plan is for: the model's, and those of the user's own."""
    cluster: Cluster
    limit_bytes: float
    """Memory a rank may use."""
    num_candidates: int
    """Size of the space, in which plans that differ in the number of recomputed layers alone count as one."""
    best: Evaluated | None
    """None where nothing fits."""
    alternatives: tuple[Evaluated, ...]
    """The best plan with one decision changed, fitting or not, by time."""
    near_misses: tuple[Evaluated, ...]
    """Where nothing fits: the plans that exceed the memory by least, of different meshes."""

    def plan(self) -> ParallelPlan:
        """The plan for the runtime. Raises ConfigError where nothing fits."""
        if self.best is None:
            raise ConfigError(
                f"no plan fits {limits_text(self)}; the nearest exceeds {excess_text(self, self.near_misses[0])}. "
                "See the suggestions"
            )
        best, request = self.best, self.request
        candidate = best.candidate
        mesh = candidate.mesh
        return ParallelPlan(
            model_fingerprint=self.config.fingerprint(),
            cluster_fingerprint=self.cluster.fingerprint(),
            plan_gpus=mesh.copy_gpus,
            runtime_gpus=request.runtime_gpus,
            mesh=mesh,
            sequence_length=request.sequence_length,
            tokens_per_step=request.tokens_per_step,
            micro_batch_sequences=candidate.micro_batch_sequences,
            gradient_accumulation_steps=candidate.gradient_accumulation_steps,
            layers=candidate.layers,
            compute_dtype=request.compute_dtype,
            **vars(candidate.formats),
            dense_sharding=candidate.dense_sharding,
            **vars(candidate.gemms),
            lora=request.lora,
            prediction=Prediction(
                step_seconds=best.time.total,
                tokens_per_second=request.tokens_per_step / best.time.total,
                breakdown_seconds=best.time.exposed,
                peak_bytes=round(best.memory.total),
                breakdown_bytes={name: round(value) for name, value in best.memory.breakdown.items()},
                allocated_bytes=round(best.memory.allocated),
                peak_moment=best.memory.moment,
            ),
            alternatives=tuple(alternative_summary(self, other) for other in self.alternatives),
        )


def usable_bytes(cluster: Cluster, request: PlanRequest) -> int:
    """Memory of a GPU that a plan may take: all of it, less a margin where several GPUs talk to each other."""
    return cluster.memory_bytes - (cluster.margin_bytes if request.runtime_gpus > 1 else 0)


def excess_bytes(result: PlanResult, evaluated: Evaluated) -> dict[str, int]:
    """By how much a plan exceeds the memory of a GPU, and its share of the host's; keys of the JSON, zeros left out."""
    excess = {
        "exceeds_memory_by_bytes": evaluated.memory.total - result.limit_bytes,
        "exceeds_host_memory_by_bytes": evaluated.host_bytes - result.cluster.host_memory_bytes,
    }
    return {name: math.ceil(size) for name, size in excess.items() if size > 0}


def excess_text(result: PlanResult, evaluated: Evaluated) -> str:
    """For example ``GPU memory by 6.2 GiB and host memory by 1.0 GiB``; empty where neither is exceeded."""
    names = {"exceeds_memory_by_bytes": "GPU memory", "exceeds_host_memory_by_bytes": "host memory"}
    parts = excess_bytes(result, evaluated).items()
    return " and ".join(f"{names[key]} by {size / 2**30:.1f} GiB" for key, size in parts)


def limits_text(result: PlanResult) -> str:
    """What a plan must fit, for example ``59.6 GiB per GPU (host memory: 232.8 GiB per GPU)``."""
    host = result.cluster.host_memory_bytes / 2**30
    return f"{result.limit_bytes / 2**30:.1f} GiB per GPU (host memory: {host:.1f} GiB per GPU)"


def exclusions(request: PlanRequest, other: Evaluated) -> list[str]:
    """What of the request rules a plan out, in the words of the command line."""
    found = [] if request.plan_gpus in (None, other.candidate.mesh.copy_gpus) else [f"--plan-gpus {request.plan_gpus}"]
    decisions = {name: decision_text(value) for name, value in other.decisions.items()}
    found += [f"--pin {name}={value}" for name, value in request.pins.items() if decisions[name] != value]
    found += [f"--forbid {name}={value}" for name, value in sorted(request.forbidden) if decisions[name] == value]
    return found


def alternative_summary(result: PlanResult, other: Evaluated) -> dict[str, Any]:
    """One decision that lost, with the number that lost it; JSON-able."""
    assert result.best is not None
    mine, theirs = result.best.decisions, other.decisions
    changed = changes(mine, theirs)
    return {
        "decision": changed[0],
        "value": decision_text(theirs[changed[0]]),
        "instead_of": decision_text(mine[changed[0]]),
        "step_seconds": other.time.total,
        "slower_by": other.time.total / result.best.time.total - 1,
        "peak_bytes": round(other.memory.total),
        "exceeds_memory_by_bytes": 0,
        **excess_bytes(result, other),
        "excluded_by": exclusions(result.request, other),
        "supported": other.supported,
    }


def changes(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Names of the decisions that differ. Data-parallel sizes follow from the others, unless they alone differ."""
    changed = [name for name in mine if mine[name] != theirs[name]]
    # Of nothing there is no number.
    changed = [name for name in changed if name == (what := name.removesuffix("_layers")) or what not in changed]
    if "dense_sharding" in changed:  # whole weights have nothing to reshard, and no axis but data's
        changed = [name for name in changed if not name.endswith("_reshard")]
        if set(changed) & set(FSDP_AXES):
            changed.remove("dense_sharding")
    return [name for name in changed if name not in ("dp_replicate", "dp_shard")] or changed[-1:]
