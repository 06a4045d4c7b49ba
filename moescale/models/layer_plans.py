"""A plan's decisions for each layer of a model, by the layer kinds that the model's family names. Imports no torch."""

from __future__ import annotations

from collections import Counter

from moescale.config import ModelConfig
from moescale.errors import ConfigError, nearest
from moescale.models.registry import family_of
from moescale.plan import LayerPlan, ParallelPlan


def plan_of_layers(plan: ParallelPlan, config: ModelConfig) -> list[LayerPlan]:
    """Return the plan of every layer, by index, with ``recompute_layers`` resolved.

    Raises ConfigError for a layer kind that the model's family does not name, operators that its layers lack, and more
    layers than the model has of it.
    """
    family = family_of(config)
    kinds = {kind.name: kind for kind in family.layers(config)}
    for layer in plan.layers:
        if layer.kind not in kinds:
            raise ConfigError(
                f"plan.layers: '{layer.kind}' is not a layer kind of {config.model_type}; its kinds are "
                f"{', '.join(kinds)}{nearest(layer.kind, kinds)}; compile a plan for this model"
            )
        missing = [name for name in layer.operators if name not in kinds[layer.kind].operators]
        if missing:
            raise ConfigError(
                f"plan.layers.{layer.kind}.recompute ('{missing[0]}') must be none or block: {layer.kind} layers of "
                f"{config.model_type} have no such operator; compile a plan for this model"
            )
        number, count = layer.recompute_layers, kinds[layer.kind].count
        if number is not None and number > count:
            raise ConfigError(
                f"plan.layers.{layer.kind}.recompute_layers ({number}) must be at most the model's {count} "
                f"{layer.kind} layers; compile a plan for this model"
            )
    found: list[LayerPlan] = []
    numbers: Counter[str] = Counter()
    for kind in family.layer_kinds(config):
        found.append(plan.layer(kind).of_layer(numbers[kind]))
        numbers[kind] += 1
    return found
