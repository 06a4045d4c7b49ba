"""ParallelPlan: the only thing the planner hands to the runtime. JSON in and out, validated. Imports no torch.

A plan binds the named dims of the model's operators to mesh axes and fixes what decides memory. Always:

    plan_gpus       = pp * dp_shard * cp * tp
    runtime_gpus    = plan_gpus * dp_replicate
    tokens_per_step = sequence_length * micro_batch_sequences * gradient_accumulation_steps * dp_replicate * dp_shard

``ep`` divides ``dp_shard * cp`` and adds no GPUs: experts live on the data-parallel GPUs of a scale unit, each of which
holds ``num_experts / ep`` of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moescale import __version__
from moescale.config import ModelConfig
from moescale.errors import ConfigError
from moescale.files import write_atomically
from moescale.formats import (
    FP8_GEMM_MULTIPLE,
    ComputeFormat,
    GemmFormat,
    GradientFormat,
    MasterFormat,
    MomentFormat,
)
from moescale.lora import LoraSettings
from moescale.records import FileKind, build, parse_json_object, read_bytes, show

PLAN_FORMAT = 2
"""2: layer kinds by name. Version 0.1.0 wrote 1, with the two kinds ``dense`` and ``moe``, which is still read."""
MAX_TOKENS_PER_STEP = 2**30
"""Beyond any training's; 16 GiB of token ids and targets."""
DenseSharding = Literal["zero1", "fsdp"]
SAVED_ROWS_FACTOR = 1.125
"""Rows per layer whose pre-activation an expert-parallel rank keeps, over those of even routing; it recomputes more."""
RECOMPUTABLE_OPERATORS = ("experts",)
"""Operators that a plan can name to be recomputed by themselves, in layers that have them."""


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Number of GPUs along every mesh axis; ``ep`` overlays the data-parallel axes of a scale unit."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def copy_gpus(self) -> int:
        """GPUs that hold one copy of the weights."""
        return self.pp * self.dp_shard * self.cp * self.tp

    @property
    def gpus(self) -> int:
        """GPUs of all copies."""
        return self.copy_gpus * self.dp_replicate


UNSUPPORTED_AXES = ("pp", "cp", "tp")
"""Mesh axes that the planner prices and that this version's runtime does not have; read by the two functions below."""
FSDP_AXES = ("pp", "cp", "tp")
"""Mesh axes that only ``dense_sharding`` fsdp knows: zero1 keeps whole weights along data-parallel axes alone."""


def is_supported(axis: str) -> bool:
    """Whether this version can run a mesh in which ``axis`` is larger than 1."""
    return axis not in UNSUPPORTED_AXES


def unsupported_sizes(mesh: MeshShape) -> dict[str, int]:
    """Return the sizes above 1 of axes that this version cannot run; empty for a mesh that it can."""
    return _sizes_above_1(mesh, UNSUPPORTED_AXES)


def fsdp_sizes(mesh: MeshShape) -> dict[str, int]:
    """Return the sizes above 1 of axes along which zero1 cannot keep weights; empty for a mesh on which it can."""
    return _sizes_above_1(mesh, FSDP_AXES)


def _sizes_above_1(mesh: MeshShape, axes: tuple[str, ...]) -> dict[str, int]:
    return {axis: getattr(mesh, axis) for axis in axes if getattr(mesh, axis) != 1}


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What is kept and what is recomputed, the same for all layers of one kind."""

    kind: str
    """One of the layer kinds that the model's family names."""
    recompute: Literal["none", "block"] | tuple[str, ...] = "none"
    """Nothing, the whole block, or the operators named."""
    recompute_layers: int | None = None
    """In how many layers of the kind, the first of the model; None: in all. What the others keep is freed by the time
    the backward comes to these."""
    reshard_after_forward: bool = True
    """Free the gathered weights after the forward pass, and gather them again in the backward."""

    @property
    def operators(self) -> tuple[str, ...]:
        """The operators that the layers recompute by themselves."""
        return () if isinstance(self.recompute, str) else self.recompute

    def recomputed_share(self, num_layers: float) -> float:
        """Return which part of the kind's ``num_layers`` recomputes what ``recompute`` says."""
        return 1.0 if self.recompute_layers is None else self.recompute_layers / num_layers

    def of_layer(self, number: int) -> LayerPlan:
        """Return what layer ``number`` of the kind does, counted from 0."""
        if self.recompute_layers is None:
            return self
        recompute = self.recompute if number < self.recompute_layers else "none"
        return dataclasses.replace(self, recompute=recompute, recompute_layers=None)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the planner expects of a plan."""

    step_seconds: float
    tokens_per_second: float
    """Of all GPUs together."""
    breakdown_seconds: dict[str, float]
    peak_bytes: int
    """On a GPU, the largest: with context, NCCL's buffers, symmetric memory and fragmentation."""
    breakdown_bytes: dict[str, int]
    allocated_bytes: int = 0
    """What of ``peak_bytes`` torch's allocator hands out: ``torch.cuda.max_memory_allocated``. 0: not predicted."""
    peak_moment: str = ""
    """When in a step the peak falls."""


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """Everything the runtime needs to know; built by the planner or :func:`one_device_plan`."""

    model_fingerprint: str
    cluster_fingerprint: str
    """Of the cluster file the plan was made for; empty for a plan made without one."""
    plan_gpus: int
    """GPUs of a scale unit, which holds one full copy of the weights."""
    runtime_gpus: int
    mesh: MeshShape
    sequence_length: int
    tokens_per_step: int
    micro_batch_sequences: int
    """Sequences one GPU runs forward and backward at once."""
    gradient_accumulation_steps: int
    layers: tuple[LayerPlan, ...]
    """One for each layer kind. A kind without one recomputes nothing; its weights are freed after the forward pass
    where they are sharded."""
    compute_dtype: ComputeFormat
    optimizer_state_dtype: MomentFormat
    """Of both AdamW moments."""
    master_weight_format: MasterFormat
    gradient_dtype: GradientFormat
    """In which gradients are accumulated and reduced."""
    dense_sharding: DenseSharding = "fsdp"
    """How weights outside the routed experts are kept on several GPUs.

    ``zero1``: whole on every rank; gradients are accumulated locally and reduced once a step, only optimizer states are
    sharded. ``fsdp``: sharded over ``dp_shard`` too, gathered layer by layer. Plans without the field are ``fsdp``.
    """
    offload_optimizer: bool = False
    """Keep optimizer state in host memory."""
    expert_gemms: GemmFormat = "compute"
    """Of the routed experts: fp8 means all six GEMMs of forward and backward. Plans without the field are ``compute``,
    and so with the next."""
    dense_gemms: GemmFormat = "compute"
    """Of linear layers in the decoder layers (attention's projections, shared experts, dense MLPs): fp8 means the
    result and the gradient of the input. Gradients of weights are computed in the compute dtype."""
    lora: LoraSettings | None = None
    """Adapters to train with all other weights frozen; None: all weights are trained."""
    prediction: Prediction | None = None
    alternatives: tuple[dict[str, Any], ...] = ()
    """Decisions that lost, each with the number that lost it."""
    moescale_version: str = __version__
    format: int = PLAN_FORMAT

    def __post_init__(self) -> None:
        validate(self)

    @property
    def sequences_per_step(self) -> int:
        return self.tokens_per_step // self.sequence_length

    def layer(self, kind: str) -> LayerPlan:
        """The plan of the layers of ``kind``."""
        default = LayerPlan(kind=kind, reshard_after_forward=self.dense_sharding != "zero1")
        return next((layer for layer in self.layers if layer.kind == kind), default)

    def check_model(self, config: ModelConfig) -> None:
        """Raise ConfigError unless the plan was made for this model and can be run with it."""
        if config.fingerprint() != self.model_fingerprint:
            raise ConfigError(
                f"plan.model_fingerprint ({self.model_fingerprint}) differs from the model's ({config.fingerprint()}); "
                "compile a plan for this model, or give the model the plan was compiled for"
            )
        if config.num_experts is not None and config.num_experts % self.mesh.ep:
            raise ConfigError(
                f"model.num_experts ({config.num_experts}) must be divisible by plan.mesh.ep ({self.mesh.ep})"
            )
        if self.expert_gemms == "fp8":
            check_experts_in_fp8(config)

    def to_json(self) -> str:
        """The plan as JSON; :meth:`from_json` gives back an equal plan."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str | bytes, path: str = "plan") -> ParallelPlan:
        """Read and validate a plan. ``path`` names it in errors. Raises ConfigError."""
        document = parse_json_object(text, path, _FILE)
        written = document.get("format")
        if written == 1 and not isinstance(written, bool):
            document = _from_format_1(document, path)
        elif written != PLAN_FORMAT:
            raise ConfigError(
                f"{path}: format ({show(written)}) must be 1 or {PLAN_FORMAT}; compile it again with this version"
            )
        return build(cls, document, path, _FILE)


_FILE = FileKind(
    noun="a plan",
    root="plan",
    remedy="compile it again",
    missing="missing; write a plan with `moescale compile`",
)


def _from_format_1(document: dict[str, Any], path: str) -> dict[str, Any]:
    """``document`` as today's format writes it. Raises ConfigError where it lacks one of the two kinds it must have."""
    found = {name: value for name, value in document.items() if name not in ("dense_layers", "moe_layers")}
    layers = []
    for kind in ("dense", "moe"):
        value = document.get(f"{kind}_layers")
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: plan.{kind}_layers ({show(value)}) must be an object; compile it again")
        layers.append(value | {"kind": kind})
    return found | {"layers": layers, "format": PLAN_FORMAT}


def has_whole_weights(mesh: MeshShape, sharding: DenseSharding) -> bool:
    """Whether every rank holds each weight that it multiplies by whole, as GEMMs in fp8 need."""
    return mesh.gpus == 1 or sharding == "zero1"


def expert_shard_dim(shape: Sequence[int], shards: int) -> int:
    """Which dim of a rank's experts [E / ep, rows, columns] its data-parallel shards divide.

    The experts themselves where they divide, else their rows; where neither does, experts, of which the last ranks then
    have fewer.
    """
    return next((dim for dim in (0, 1) if shape[dim] % shards == 0), 0)


def no_experts_in_fp8(config: ModelConfig) -> str | None:
    """Why the routed experts of ``config``'s model cannot multiply in fp8; None where they can."""
    if not config.num_moe_layers:
        return "the model has no routed experts"
    if config.has_expert_biases or config.swiglu_clamp is not None:
        return "this version has no experts with biases or a clamped activation in fp8"
    for name in ("hidden_size", "expert_intermediate_size"):
        if getattr(config, name) % FP8_GEMM_MULTIPLE:
            return f"model.{name} ({getattr(config, name)}) is no multiple of {FP8_GEMM_MULTIPLE}"
    return None


def check_experts_in_fp8(config: ModelConfig) -> None:
    """Raise ConfigError where :func:`no_experts_in_fp8` has a reason."""
    obstacle = no_experts_in_fp8(config)
    if obstacle is not None:
        raise ConfigError(f"plan.expert_gemms (fp8) must be compute: {obstacle}; compile the plan again")


def one_device_plan(
    config: ModelConfig,
    *,
    sequence_length: int,
    micro_batch_sequences: int,
    gradient_accumulation_steps: int,
    compute_dtype: ComputeFormat,
    expert_gemms: GemmFormat = "compute",
    dense_gemms: GemmFormat = "compute",
    lora: LoraSettings | None = None,
) -> ParallelPlan:
    """The plan of a run without a search: one device, fp32 master weights, nothing recomputed."""
    return ParallelPlan(
        model_fingerprint=config.fingerprint(),
        cluster_fingerprint="",
        plan_gpus=1,
        runtime_gpus=1,
        mesh=MeshShape(),
        sequence_length=sequence_length,
        tokens_per_step=sequence_length * micro_batch_sequences * gradient_accumulation_steps,
        micro_batch_sequences=micro_batch_sequences,
        gradient_accumulation_steps=gradient_accumulation_steps,
        layers=(),
        compute_dtype=compute_dtype,
        optimizer_state_dtype="fp32",
        master_weight_format="fp32",
        gradient_dtype="fp32",
        expert_gemms=expert_gemms,
        dense_gemms=dense_gemms,
        lora=lora,
    )


def load_plan(path: Path) -> ParallelPlan:
    """Read a plan file. Raises ConfigError naming the path where it is missing or contradicts itself."""
    return ParallelPlan.from_json(read_bytes(path, _FILE), str(path))


def save_plan(plan: ParallelPlan, path: Path) -> None:
    """Write a plan file, whole or not at all. Raises ConfigError naming the path where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, plan.to_json() + "\n")
    except OSError as error:
        raise ConfigError(f"plan file ({path}) cannot be written: {error.strerror}; give another path") from None


def validate(plan: ParallelPlan) -> None:
    """Check every rule that holds for any plan; called on construction. Raises ConfigError."""
    positive: list[tuple[str, int]] = [(f"mesh.{name}", size) for name, size in vars(plan.mesh).items()]
    for name in (
        *("plan_gpus", "runtime_gpus", "sequence_length", "tokens_per_step"),
        *("micro_batch_sequences", "gradient_accumulation_steps"),
    ):
        positive.append((name, getattr(plan, name)))
    for name, value in positive:
        if value < 1:
            raise ConfigError(f"plan.{name} ({value}) must be at least 1")
    if plan.tokens_per_step > MAX_TOKENS_PER_STEP:
        raise ConfigError(
            f"plan.tokens_per_step ({plan.tokens_per_step}) must be at most {MAX_TOKENS_PER_STEP}: the sequences of "
            "whole steps are read ahead into memory"
        )
    _check_mesh(plan)
    _check_kinds(plan)
    _check_dense_sharding(plan)
    _check_recompute(plan)
    _check_gemms(plan)
    if plan.prediction is not None:
        _check_prediction(plan.prediction)
    tokens = plan.sequence_length * plan.micro_batch_sequences * plan.gradient_accumulation_steps
    tokens *= plan.mesh.dp_replicate * plan.mesh.dp_shard
    if plan.tokens_per_step != tokens:
        raise ConfigError(
            f"plan.tokens_per_step ({plan.tokens_per_step}) must be sequence_length * micro_batch_sequences * "
            f"gradient_accumulation_steps * dp_replicate * dp_shard ({plan.sequence_length} * "
            f"{plan.micro_batch_sequences} * {plan.gradient_accumulation_steps} * {plan.mesh.dp_replicate} * "
            f"{plan.mesh.dp_shard} = {tokens})"
        )
    if plan.compute_dtype == "fp32":
        for name in ("master_weight_format", "gradient_dtype"):
            if getattr(plan, name) != "fp32":
                raise ConfigError(
                    f"plan.{name} ('{getattr(plan, name)}') must be fp32 where plan.compute_dtype is fp32"
                )


def _check_kinds(plan: ParallelPlan) -> None:
    kinds = [layer.kind for layer in plan.layers]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise ConfigError(f"plan.layers: kind '{kind}' occurs {kinds.count(kind)} times; keep one of them")


def _check_recompute(plan: ParallelPlan) -> None:
    for layer in plan.layers:
        path = f"plan.layers.{layer.kind}"
        if layer.recompute_layers is not None and (layer.recompute_layers < 1 or layer.recompute == "none"):
            raise ConfigError(
                f"{path}.recompute_layers ({layer.recompute_layers}) must be at least 1, and absent where recompute is "
                "none; compile the plan again"
            )
        for name in layer.operators:
            if name not in RECOMPUTABLE_OPERATORS:
                raise ConfigError(
                    f"{path}.recompute ('{name}') must be none, block, or of these operators: "
                    f"{', '.join(RECOMPUTABLE_OPERATORS)}; compile the plan with this version"
                )


def _check_gemms(plan: ParallelPlan) -> None:
    for name in ("expert_gemms", "dense_gemms"):
        if getattr(plan, name) != "fp8":
            continue
        if plan.compute_dtype != "bf16":
            raise ConfigError(
                f"plan.{name} (fp8) needs plan.compute_dtype bf16, which is {plan.compute_dtype}; compile it with "
                "--precision fp8"
            )
        if plan.lora is not None:
            raise ConfigError(
                f"plan.{name} (fp8) must be compute where plan.lora ({plan.lora.text()}) trains adapters: this version "
                "multiplies in fp8 only where weights are trained; leave out --precision fp8, or --lora"
            )
        if not has_whole_weights(plan.mesh, plan.dense_sharding):
            raise ConfigError(
                f"plan.{name} (fp8) must be compute where plan.dense_sharding is {plan.dense_sharding} on "
                f"{plan.runtime_gpus} GPUs: copies in fp8 are made of whole weights; compile the plan again"
            )


def _check_prediction(prediction: Prediction) -> None:
    for name, value in vars(prediction).items():
        figures = value if isinstance(value, dict) else {"": value}
        for part, figure in figures.items():
            if not isinstance(figure, str) and not 0 <= figure < math.inf:
                path = f"plan.prediction.{name}" + (f".{part}" if part else "")
                raise ConfigError(f"{path} ({figure}) must be a finite number of at least 0; compile the plan again")


def _check_mesh(plan: ParallelPlan) -> None:
    mesh = plan.mesh
    product = mesh.copy_gpus
    if plan.plan_gpus != product:
        raise ConfigError(
            f"plan.plan_gpus ({plan.plan_gpus}) must be pp * dp_shard * cp * tp "
            f"({mesh.pp} * {mesh.dp_shard} * {mesh.cp} * {mesh.tp} = {product})"
        )
    if plan.runtime_gpus != mesh.gpus:
        raise ConfigError(
            f"plan.runtime_gpus ({plan.runtime_gpus}) must be plan_gpus * dp_replicate "
            f"({product} * {mesh.dp_replicate} = {mesh.gpus})"
        )
    if (mesh.dp_shard * mesh.cp) % mesh.ep:
        raise ConfigError(
            f"plan.mesh.ep ({mesh.ep}) must divide dp_shard * cp ({mesh.dp_shard} * {mesh.cp}): "
            "experts live on the data-parallel GPUs of a scale unit"
        )


def _check_dense_sharding(plan: ParallelPlan) -> None:
    if plan.dense_sharding != "zero1":
        return
    for layer in plan.layers:
        if layer.reshard_after_forward:
            raise ConfigError(
                f"plan.layers.{layer.kind}.reshard_after_forward (True) must be False where plan.dense_sharding is "
                "zero1: weights are whole on every rank, so there is nothing to free; compile the plan again"
            )
    for axis, size in fsdp_sizes(plan.mesh).items():
        raise ConfigError(
            f"plan.mesh.{axis} ({size}) must be 1 where plan.dense_sharding is zero1: this version keeps whole "
            "weights along data-parallel axes only; use fsdp"
        )
