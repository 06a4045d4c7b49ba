"""Plans, data and trainers of the distributed tests: the same training run, in any layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moescale.config import ModelConfig
from moescale.coordinates import Coordinates
from moescale.plan import LayerPlan, MeshShape, ParallelPlan
from moescale.runtime.checkpoint_store import CheckpointStore
from moescale.runtime.mapping import optimizer_format
from moescale.runtime.ranks import current_ranks
from moescale.runtime.session import place_model
from moescale.runtime.settings import TrainSettings
from moescale.runtime.train import Trainer
from tiny import tiny_config

SEQUENCES_PER_STEP = 8
SEQUENCE_LENGTH = 16


def make_plan(
    config: ModelConfig, *, accumulation: int = 1, recompute: Any = "none", reshard: bool | None = None, **fields
):
    """A plan of eight sequences a step for ``tiny_config``; mesh axes and formats by keyword.

    Weights are whole on every rank unless ``dense_sharding`` says otherwise; then they are freed after the forward.
    """
    sharding = fields.setdefault("dense_sharding", "zero1")
    reshard = sharding == "fsdp" if reshard is None else reshard
    axes = {name: fields.pop(name) for name in ("dp_replicate", "dp_shard", "ep") if name in fields}
    mesh = MeshShape(**axes)
    ranks = mesh.dp_replicate * mesh.dp_shard
    dense = recompute if isinstance(recompute, str) else "none"
    number = fields.pop("recompute_layers", None)
    formats = dict(
        compute_dtype="fp32", optimizer_state_dtype="fp32", master_weight_format="fp32", gradient_dtype="fp32"
    )
    return ParallelPlan(
        model_fingerprint=config.fingerprint(),
        cluster_fingerprint="",
        plan_gpus=mesh.dp_shard,
        runtime_gpus=ranks,
        mesh=mesh,
        sequence_length=SEQUENCE_LENGTH,
        tokens_per_step=SEQUENCES_PER_STEP * SEQUENCE_LENGTH,
        micro_batch_sequences=SEQUENCES_PER_STEP // ranks // accumulation,
        gradient_accumulation_steps=accumulation,
        layers=(
            LayerPlan(kind="dense", recompute=dense, reshard_after_forward=reshard),
            LayerPlan(kind="moe", recompute=recompute, recompute_layers=number, reshard_after_forward=reshard),
        ),
        **(formats | fields),
    )


@dataclass(frozen=True)
class SyntheticBatch:
    tokens: torch.Tensor
    targets: torch.Tensor
    sequence_ids: torch.Tensor
    document_starts: torch.Tensor | None = None
    padding: torch.Tensor | None = None


class SyntheticSteps:
    """A step's sequences, drawn from its number; this data rank's share of them. Remembers which it handed out."""

    def __init__(
        self,
        plan: ParallelPlan,
        vocabulary: int,
        one_token: bool = False,
        place: Coordinates | None = None,
        without_targets: tuple[int, ...] = (7,),
        with_padding: bool = False,
    ) -> None:
        self.with_padding = with_padding
        self.without_targets = list(without_targets)
        self.plan, self.vocabulary, self.one_token = plan, vocabulary, one_token
        self.place = place or Coordinates(mesh=plan.mesh, rank=current_ranks().rank)
        self.position = 0
        self.seen: list[list[int]] = []

    def __iter__(self):
        while True:
            generator = torch.Generator().manual_seed(self.position)
            number = self.plan.sequences_per_step
            shape = (number, SEQUENCE_LENGTH)
            tokens = torch.randint(self.vocabulary, shape, generator=generator)
            if self.one_token:
                tokens = torch.full(shape, self.position % self.vocabulary)
            targets = torch.randint(self.vocabulary, shape, generator=generator)
            targets[3, 5:] = -100  # so that ranks and micro-batches have unequal numbers of targets
            targets[self.without_targets] = -100
            lengths = torch.tensor([16, 9, 16, 12, 3, 16, 14, 5])[torch.arange(number) % 8]
            padding = torch.arange(SEQUENCE_LENGTH) >= lengths[:, None]
            if self.with_padding:
                targets[padding] = -100
            ids = torch.arange(number) + number * self.position
            self.position += 1
            share = number // self.place.num_data_ranks
            mine = slice(self.place.data_rank * share, (self.place.data_rank + 1) * share)
            self.seen.append(ids[mine].tolist())
            parts = (part[mine].split(self.plan.micro_batch_sequences) for part in (tokens, targets, ids, padding))
            yield [
                SyntheticBatch(*part, padding=padding if self.with_padding else None)
                for *part, padding in zip(*parts, strict=True)
            ]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


@dataclass
class Recorder:
    losses: list[float] = field(default_factory=list)
    saves: list[int] = field(default_factory=list)
    metrics: list[Any] = field(default_factory=list)
    after_step: Any = None

    def on_resume(self, step, path):
        pass

    def on_step(self, metrics):
        self.losses.append(metrics.loss)
        self.metrics.append(metrics)
        if self.after_step:
            self.after_step(metrics)

    def on_validation(self, step, loss):
        pass

    def on_checkpoint(self, step, path, seconds):
        self.saves.append(step)


def make_trainer(
    folder: Path,
    *,
    total_steps: int = 20,
    model: dict[str, Any] | None = None,
    build_config: Callable[..., ModelConfig] = tiny_config,
    one_token: bool = False,
    without_targets: tuple[int, ...] = (7,),
    with_padding: bool = False,
    settings: dict[str, Any] | None = None,
    plan: ParallelPlan | None = None,
    round_weights: bool = False,
    **plan_fields: Any,
) -> Trainer:
    """A trainer of a tiny model by ``plan`` or one of ``plan_fields``, on the ranks of the process group or alone.

    ``round_weights`` makes the initial weights those of a bf16 model, whatever the compute dtype.
    """
    config = build_config(**(model or {}))
    plan = plan or make_plan(config, **plan_fields)
    ranks = current_ranks()
    placed = place_model(config, plan, ranks, torch.device("cpu"))
    placed.initialize(seed=0)
    if round_weights:
        with torch.no_grad():
            for weight in placed.model.parameters():
                weight.copy_(weight.bfloat16())
    return Trainer(
        model=placed.model,
        settings=TrainSettings(**({"learning_rate": 3e-3, "warmup_steps": 2} | (settings or {}))),
        total_steps=total_steps,
        source=SyntheticSteps(
            plan, config.vocab_size, one_token, without_targets=without_targets, with_padding=with_padding
        ),
        store=CheckpointStore(folder, keep=3),
        observer=Recorder(),
        optimizer_format=optimizer_format(plan),
        identity={"model": config.fingerprint()},
        ranks=ranks,
        parts=placed.parts,
        coordinates=placed.coordinates,
    )
