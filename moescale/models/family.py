"""What a model family declares; the planner, the conversion and the runtime learn of a family from this alone.

Imports no torch: what needs it is named and imported when a model is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moescale.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class LayerList:
    """The operators of one kind of layer, in the order of the forward pass, and which layers are of it."""

    name: str
    operators: tuple[str, ...]
    """Names of registered operators."""
    indices: tuple[int, ...]
    """Of the model's layers of this kind, ascending."""

    @property
    def count(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, kw_only=True)
class HfNames:
    """Names of a family's tensors in a Hugging Face folder; those of layers behind the layer's prefix."""

    whole: Mapping[str, str]
    """Module of a layer -> the module whose weight and bias are its own."""
    gate_and_up: Mapping[str, str]
    """Module of a layer that stacks gate and up -> the module that holds ``gate_proj`` and ``up_proj``."""
    experts: str
    """The module that holds the experts by number, each with ``gate_proj``, ``up_proj`` and ``down_proj``."""
    outside_layers: Mapping[str, str] = field(
        default_factory=lambda: {
            "embedding.weight": "model.embed_tokens.weight",
            "norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight",
        }
    )
    """Parameter -> tensor."""
    layer_prefix: str = "model.layers.{layer}."
    """With ``{layer}`` for the layer's number."""
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Parameter or buffer of a layer -> tensor, for those whose own name differs too."""

    experts_are_stacked: bool = False
    """A layer's experts are one tensor each of ``gate_up_proj`` [E, H, 2F], ``down_proj`` [E, F, H] and their biases.

    The columns of gate and up alternate. The weights may be in MXFP4, as blocks and scales.
    """

    @property
    def embedding(self) -> str:
        return self.outside_layers["embedding.weight"]

    @property
    def output(self) -> str:
        return self.outside_layers["output.weight"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture, whatever its sizes. Its functions take its own class of configuration."""

    model_type: str
    """Of config.json."""
    read_hf: Callable[[Mapping[str, Any], str], ModelConfig]
    """(document, path in errors) -> configuration. Raises ConfigError for what it does not know."""
    hf_fields: frozenset[str]
    """Fields of config.json that decide what is trained; ``read_hf`` knows no other ones, but the harmless."""
    write_hf: Callable[[Any, str], dict[str, Any]]
    """(configuration, dtype of the weights) -> config.json, which ``read_hf`` gives back."""
    transformers_differences: Callable[[Any], list[str]]
    """Where transformers departs from the published definition for a model of this family."""
    names: HfNames
    layers: Callable[[Any], tuple[LayerList, ...]]
    """The layer kinds that the family has, those that a model lacks with count 0."""
    outside: tuple[str, ...]
    """Operators outside the layers."""
    dims: Callable[[Any], dict[str, int]]
    """Sizes of the operators' dims that do not depend on the batch."""
    biases: Callable[[Any], int] = lambda config: 0
    """Parameters of one layer that annotations leave out for their smallness."""
    builder: str
    """``module:function`` of (configuration) -> Transformer."""

    def dims_of(self, config: ModelConfig, tokens: int, sequence_length: int) -> dict[str, int]:
        """Return the sizes of all dims for a micro-batch of ``tokens`` in sequences of ``sequence_length``."""
        return self.dims(config) | {
            "n": tokens,
            "r": tokens * max(1, config.top_k),
            "b": -(-tokens // max(1, sequence_length)),
            "x": sequence_length,
        }

    def layer_kinds(self, config: ModelConfig) -> tuple[str, ...]:
        """Return the kind of every layer of a model, by index."""
        found = {index: kind.name for kind in self.layers(config) for index in kind.indices}
        assert sorted(found) == list(range(config.num_layers)), "every layer is of one kind"
        return tuple(found[index] for index in range(config.num_layers))

    def build(self, config: ModelConfig) -> Any:
        """Build a model of this family, on the device of the context."""
        module, _, function = self.builder.partition(":")
        return getattr(importlib.import_module(module), function)(config)
