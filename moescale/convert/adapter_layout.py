"""Maps the adapters of a model to and from the two file layouts in use.

``peft``: the layout of PEFT from 0.19.1 on. Routed experts are adapted as the stacked parameters of transformers 5: A
is [E * r, in], with the experts one after the other, and B is [out, r * E], with the expert innermost.
``experts.base_layer`` is the adapter of gate and up, ``experts`` that of down (``ParamWrapper`` in
peft/tuners/lora/layer.py). ``per-expert``: two matrices for each of ``experts.N.gate_proj``, ``up_proj`` and
``down_proj``, as inference servers expect; gate and up have the same A.

MLP layers are listed for PEFT as parameters, because as modules it takes them for routed experts
(huggingface/peft#3711).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from moescale.config import ModelConfig
from moescale.convert.key_table import build_key_table
from moescale.errors import CheckpointError
from moescale.lora import LoraSettings
from moescale.models.lora import ExpertsAdapter, adapters_of, add_adapters
from moescale.models.registry import family_of
from moescale.models.transformer import build_on_meta

Layout = Literal["peft", "per-expert"]
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class AdaptedModule:
    """A module of the model that can have an adapter, and the corresponding modules of a Hugging Face folder."""

    name: str
    keys: tuple[str, ...]
    """One per part of the parameter; for routed experts, the module that contains them."""
    num_experts: int
    """0 for a linear layer."""

    def factors(self) -> tuple[str, ...]:
        """Return the names of the adapter's parameters."""
        names = ("gate_up_a", "gate_up_b", "down_a", "down_b") if self.num_experts else ("a", "b")
        return tuple(f"{self.name}.adapter.{name}" for name in names)


def adapted_modules(config: ModelConfig, lora: LoraSettings) -> list[AdaptedModule]:
    """Return the targets of ``lora`` in the model of ``config``. Raises ConfigError for a target it does not have."""
    model = build_on_meta(config, torch.bfloat16)
    add_adapters(model, lora)
    table, names = build_key_table(config), family_of(config).names
    found = []
    for name, adapter in adapters_of(model).items():
        if isinstance(adapter, ExpertsAdapter):
            before = table[f"{name}.down"][0].key.partition(f"{names.experts}.")[0]
            keys: tuple[str, ...] = (before + names.experts,)
            found.append(AdaptedModule(name=name, keys=keys, num_experts=adapter.down_a.shape[0]))
        else:
            keys = tuple(piece.key.removesuffix(".weight") for piece in table[f"{name}.weight"])
            found.append(AdaptedModule(name=name, keys=keys, num_experts=0))
    return found


def stored_tensors(
    module: AdaptedModule, factors: list[torch.Tensor], layout: Layout
) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield the tensors of the adapter in ``layout``, with their names without prefix and suffix."""
    if not module.num_experts:
        parts = (factor.chunk(len(module.keys)) for factor in factors)
        for key, a, b in zip(module.keys, *parts, strict=True):
            yield f"{key}.lora_A", a
            yield f"{key}.lora_B", b
        return
    (key,) = module.keys
    gate_up_a, gate_up_b, down_a, down_b = factors
    if layout == "peft":
        for wrapper, a, b in ((f"{key}.base_layer", gate_up_a, gate_up_b), (key, down_a, down_b)):
            yield f"{wrapper}.lora_A", a.flatten(0, 1)
            yield f"{wrapper}.lora_B", b.permute(1, 2, 0).flatten(1)
        return
    for expert in range(module.num_experts):
        gate_b, up_b = gate_up_b[expert].chunk(2)
        a = gate_up_a[expert]
        for part, (of_a, of_b) in zip(MLP, ((a, gate_b), (a, up_b), (down_a[expert], down_b[expert])), strict=True):
            yield f"{key}.{expert}.{part}.lora_A", of_a
            yield f"{key}.{expert}.{part}.lora_B", of_b


def read_factors(
    module: AdaptedModule, read: Callable[[str], torch.Tensor], stored: set[str], rank: int, path: Path
) -> list[torch.Tensor]:
    """Return the adapter's parameters from its tensors: the inverse of :func:`stored_tensors`, in either layout.

    Args:
        read: reads a tensor by its name without prefix and suffix.
        stored: the names in the file, which distinguish the layouts.
        path: the file, for errors.

    Raises CheckpointError if gate and up have different A, which a fused adapter cannot represent.
    """
    if not module.num_experts:
        return [torch.cat([read(f"{key}.{factor}") for key in module.keys]) for factor in ("lora_A", "lora_B")]
    (key,) = module.keys
    if f"{PREFIX}{key}.base_layer.lora_A.weight" in stored:
        factors = []
        for wrapper in (f"{key}.base_layer", key):
            a, b = read(f"{wrapper}.lora_A"), read(f"{wrapper}.lora_B")
            factors += [a.unflatten(0, (module.num_experts, rank)), b.unflatten(1, (rank, -1)).permute(2, 0, 1)]
        return factors
    gate, up, down = (
        [
            [read(f"{key}.{expert}.{part}.{factor}") for expert in range(module.num_experts)]
            for factor in ("lora_A", "lora_B")
        ]
        for part in MLP
    )
    if not all(torch.equal(*pair) for pair in zip(gate[0], up[0], strict=True)):
        raise CheckpointError(
            f"{path}: gate_proj and up_proj of '{key}' have different lora_A; here they share one, as they do in an "
            "adapter of the stacked experts"
        )
    gate_up_b = torch.stack([torch.cat(pair) for pair in zip(gate[1], up[1], strict=True)])
    return [torch.stack(gate[0]), gate_up_b, torch.stack(down[0]), torch.stack(down[1])]
