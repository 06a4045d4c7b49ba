"""The model as the planner sees it: operators by layer kind, and what follows from their annotations.

Layers of one kind are equal, so a model is three short lists of operators (dense layer, MoE layer, what is outside the
layers) and two counts. Sizes are those of one rank's micro-batch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from moescale.config import ModelConfig
from moescale.errors import ConfigError, nearest
from moescale.models.registry import family_of
from moescale.operators import (
    Operator,
    Tensor,
    check_dims,
    is_routed,
    operator,
    routed_weight_elements,
    weight_elements,
)

OUTSIDE = "outside"
"""The kind of what is in no layer: embedding, final norm and loss."""


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """Operators of a layer, in the order of the forward pass."""

    name: str
    operators: tuple[Operator, ...]
    count: int
    """Layers of this kind in the model."""

    @property
    def is_routed(self) -> bool:
        """Whether tokens meet only some of the layer's weights, which expert parallelism then divides."""
        return any(is_routed(op) for op in self.operators)

    def dropped(self, recomputed: Collection[str]) -> frozenset[str]:
        """Return which saved tensors are not kept where the operators named are recomputed."""
        parts = (op.recompute for op in self.operators if op.name in recomputed)
        return frozenset(name for part in parts if part is not None for name in part.drops)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model's operators and the sizes of their dims."""

    config: ModelConfig
    layers: tuple[LayerKind, ...]
    """The kinds that occur, in the family's order."""
    outside: LayerKind
    """Embedding, final norm and loss."""

    def dims(self, tokens: int, sequence_length: int) -> dict[str, int]:
        """Dim sizes for a micro-batch of ``tokens`` in sequences of ``sequence_length``."""
        return family_of(self.config).dims_of(self.config, tokens, sequence_length)

    def layer_parameters(self, kind: LayerKind) -> tuple[int, int]:
        """Parameters of one layer: (without routed experts, routed experts)."""
        dims = self.dims(1, 1)
        routed = sum(routed_weight_elements(op, dims) for op in kind.operators)
        everything = sum(weight_elements(op, dims) for op in kind.operators)
        return everything - routed + family_of(self.config).biases(self.config), routed

    def outside_parameters(self) -> int:
        """Parameters outside the layers: embedding, norm, output; one embedding where the two are tied."""
        dims = self.dims(1, 1)
        total = sum(weight_elements(op, dims) for op in self.outside.operators)
        return total - (dims["w"] * dims["h"] if self.config.tie_embeddings else 0)

    def parameters(self) -> int:
        """All parameters of the model."""
        layers = sum(kind.count * sum(self.layer_parameters(kind)) for kind in self.layers)
        return layers + self.outside_parameters()


def build_workload(
    config: ModelConfig, extra: Mapping[str, tuple[str, ...]] | None = None, without: tuple[str, ...] = ()
) -> Workload:
    """List the operators of ``config``'s model.

    Args:
        extra: names of registered operators to append to a layer kind (one of the family's, or ``outside``): a model
            with an operator of the user's own.
        without: names of operators to leave out, those that such an operator replaces.

    Raises ConfigError for a layer kind, an operator or a dim of one that is not known.
    """
    family = family_of(config)
    names = {layers.name: layers.operators for layers in family.layers(config)} | {OUTSIDE: family.outside(config)}
    counts = {layers.name: layers.count for layers in family.layers(config)} | {OUTSIDE: 1}
    _check_names(names, extra or {}, without)
    kinds = {
        kind: LayerKind(
            name=kind,
            operators=tuple(operator(n) for n in (*listed, *(extra or {}).get(kind, ())) if n not in without),
            count=counts[kind],
        )
        for kind, listed in names.items()
    }
    layers = tuple(kind for kind in kinds.values() if kind.name != OUTSIDE and kind.count)
    workload = Workload(config=config, layers=layers, outside=kinds[OUTSIDE])
    dims = workload.dims(1, 1)
    for kind in kinds.values():
        for op in kind.operators:
            check_dims(op, dims)
    return workload


def _check_names(
    names: Mapping[str, tuple[str, ...]], extra: Mapping[str, tuple[str, ...]], without: tuple[str, ...]
) -> None:
    for kind in extra:
        if kind not in names:
            raise ConfigError(f"extra: '{kind}' is no layer kind; known are {', '.join(names)}{nearest(kind, names)}")
    listed = {name for group in (*names.values(), *extra.values()) for name in group}
    for name in without:
        if name not in listed:
            raise ConfigError(f"without: '{name}' is no operator of this model{nearest(name, listed)}")


def saved_bytes(kind: LayerKind, dims: Mapping[str, int], itemsize: int, dropped: frozenset[str] = frozenset()) -> int:
    """Bytes one layer keeps for its backward pass; each named tensor once, those in ``dropped`` not at all."""
    tensors = {saved.name: saved for op in kind.operators for saved in op.saved if saved.name not in dropped}
    return sum(Tensor.parse(s.dims).size(dims) * (s.itemsize or itemsize) for s in tensors.values())
