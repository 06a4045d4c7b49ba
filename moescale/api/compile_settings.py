"""Settings of a plan. Imports nothing from the planner, so that `moescale compile --help` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CompileSettings:
    """Model, cluster and batch to plan for, and files to write."""

    model: str
    """Preset name, local folder or hub name of a Hugging Face model of a known family."""
    cluster: str = "h100-sxm"
    """a100-80, h100-sxm, h200, b200, or a cluster file (.toml)."""
    plan_gpus: str = "auto"
    """GPUs that hold one full copy of the weights, or auto."""
    runtime_gpus: int | None = None
    """Total number of GPUs, a multiple of plan-gpus; default: plan-gpus."""
    tokens_per_step: int = 131072
    """Tokens of one optimizer step, over all GPUs."""
    sequence_length: int | None = None
    """Tokens of one sequence; default: those of --data, or 2048."""
    data: Path | None = None
    """Corpus written by `moescale prepare` that the plan is for: its sequences and tokenizer are compared."""
    memory_limit: float | None = None
    """Memory a GPU may use: a number of GiB, or a size such as 64GB; default: that of the cluster file."""
    precision: Literal["bf16", "fp32", "fp8"] = "bf16"
    """Compute dtype; fp8: bf16, and GEMMs in fp8 where they are faster and their copies of weights fit."""
    lora: str | None = None
    """Plan to train adapters only, as `moescale run --lora` does: rank=16,alpha=32,targets=attention+experts."""
    pin: tuple[str, ...] = ()
    """A decision to fix, as name=value (ep=4, moe_recompute=none, ...); repeatable."""
    forbid: tuple[str, ...] = ()
    """A value not to use, as name=value; repeatable."""
    router_imbalance: float = 1.1
    """Rows of the busiest rank over the mean, if experts are sharded over ranks."""
    allow_stochastic_rounding: bool = False
    """Also consider bf16 weights with stochastic rounding, without an exact fp32 master."""
    allow_unsupported: bool = False
    """Also plans this version cannot run: pipeline, context and tensor parallelism."""
    ignore_config_field: tuple[str, ...] = ()
    """A field of config.json that is not known and does not change the model; repeatable."""
    output: Path | None = None
    """Plan file to write."""
    html: Path | None = None
    """Write the explanation as a self-contained HTML page."""
