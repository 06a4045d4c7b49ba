"""The model as the planner sees it: operators by layer kind, and what follows from their annotations.

Layers of one kind are equal, so a model is three short lists of operators (dense layer, MoE layer, what is outside the
layers) and two counts. Sizes are those of one rank's micro-batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from moescale.config import ModelConfig
from moescale.errors import ConfigError, nearest
from moescale.formats import FP8_BLOCK, FP8_COPY_ROWS
from moescale.lora import LoraSettings
from moescale.models.registry import family_of
from moescale.operators import (
    Adaptable,
    Operator,
    Saved,
    Tensor,
    check_dims,
    is_routed,
    operator,
    routed_weight_elements,
    weight_elements,
)

RANK_DIM = "z"
"""The rank of adapters."""
OUTSIDE = "outside"
"""The kind of what is in no layer: embedding, final norm and loss."""


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """Operators of a layer, in the order of the forward pass."""

    name: str
    operators: tuple[Operator, ...]
    indices: tuple[int, ...]
    """Of the model's layers of this kind, ascending; what is in no layer counts once."""

    @property
    def count(self) -> int:
        return len(self.indices)

    @property
    def is_routed(self) -> bool:
        """Whether tokens meet only some of the layer's weights, which expert parallelism then divides."""
        return any(is_routed(op) for op in self.operators)

    def dropped(self, recomputed: Collection[str]) -> frozenset[str]:
        """Return which saved tensors are not kept where the operators named are recomputed."""
        parts = (op.recompute for op in self.operators if op.name in recomputed)
        return frozenset(name for part in parts if part is not None for name in part.drops)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How many weights of a kind there are in a whole model, or their bytes."""

    config: ModelConfig
    others: int
    routed: int
    """Those of routed experts."""


@dataclass(frozen=True, kw_only=True)
class LinearWeight:
    """The weight of a linear layer, or those of all routed experts of a layer."""

    rows: int
    columns: int
    experts: int
    """1 of what is no routed expert."""

    @property
    def elements(self) -> int:
        return self.experts * self.rows * self.columns

    @property
    def frozen_fp8_bytes(self) -> int:
        """As codes and scales of blocks, in which it can be kept while frozen (:mod:`moescale.kernels.block_fp8`)."""
        blocks = -(-self.rows // FP8_BLOCK) * -(-self.columns // FP8_BLOCK)
        return self.elements + 4 * self.experts * blocks

    @property
    def fp8_copies_bytes(self) -> int:
        """Of the two copies that its GEMMs in fp8 read, with scales (:mod:`moescale.kernels.fp8`)."""
        transposed = -(-self.rows // FP8_COPY_ROWS) * FP8_COPY_ROWS * self.columns
        return self.elements + self.experts * (transposed + 4)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model's operators and the sizes of their dims."""

    config: ModelConfig
    layers: tuple[LayerKind, ...]
    """The kinds that occur, in the family's order."""
    outside: LayerKind
    """Embedding, final norm and loss."""
    lora: LoraSettings | None = None
    """The adapters among the operators; None: all weights are trained."""

    def dims(self, tokens: int, sequence_length: int) -> dict[str, int]:
        """Dim sizes for a micro-batch of ``tokens`` in sequences of ``sequence_length``."""
        dims = family_of(self.config).dims_of(self.config, tokens, sequence_length)
        return dims if self.lora is None else dims | {RANK_DIM: self.lora.rank}

    def layer_parameters(self, kind: LayerKind) -> tuple[int, int]:
        """The model's own parameters of one layer: (without routed experts, routed experts)."""
        others, routed = self._elements(op for op in kind.operators if not op.is_adapter)
        return others + family_of(self.config).biases(self.config), routed

    def linear_weights(self, op: Operator) -> list[LinearWeight]:
        """Weights of ``op`` that are a linear layer's or routed experts'; of a router, a norm or the loss none."""
        dims = self.dims(1, 1)
        return [
            LinearWeight(
                rows=Tensor.parse(spot.outputs).size(dims),
                columns=Tensor.parse(spot.inputs).size(dims),
                experts=dims["e"] if is_routed(op) else 1,
            )
            for spot in op.adaptable
        ]

    def in_fp8(self, op: Operator) -> list[LinearWeight]:
        """Weights of ``op`` that are frozen and kept in fp8."""
        return [] if self.lora is None or self.lora.base != "fp8" else self.linear_weights(op)

    def layer_bytes(self, kind: LayerKind, itemsize: int) -> tuple[int, int]:
        """Bytes of :meth:`layer_parameters` where a weight in the compute dtype has ``itemsize``."""
        others, routed = (number * itemsize for number in self.layer_parameters(kind))
        for op in kind.operators:
            saved = sum(weight.elements * itemsize - weight.frozen_fp8_bytes for weight in self.in_fp8(op))
            others, routed = (others, routed - saved) if is_routed(op) else (others - saved, routed)
        return others, routed

    def adapter_parameters(self, kind: LayerKind) -> tuple[int, int]:
        """The same of the adapters."""
        return self._elements(op for op in kind.operators if op.is_adapter)

    def trained_parameters(self, kind: LayerKind) -> tuple[int, int]:
        """The same of what is trained."""
        return self.layer_parameters(kind) if self.lora is None else self.adapter_parameters(kind)

    def _elements(self, operators: Iterable[Operator]) -> tuple[int, int]:
        dims = self.dims(1, 1)
        counts = [(weight_elements(op, dims), routed_weight_elements(op, dims)) for op in operators]
        routed = sum(part for _, part in counts)
        return sum(everything for everything, _ in counts) - routed, routed

    @property
    def weights(self) -> Weights:
        """The model's own."""
        routed = sum(kind.count * self.layer_parameters(kind)[1] for kind in self.layers)
        return Weights(config=self.config, others=self.parameters() - routed, routed=routed)

    def stored(self, itemsize: int) -> Weights:
        """Bytes of the model's own weights, as :meth:`layer_bytes`."""
        counts = [(kind.count, *self.layer_bytes(kind, itemsize)) for kind in self.layers]
        others, routed = (sum(item[0] * item[part] for item in counts) for part in (1, 2))
        return Weights(config=self.config, others=others + self.outside_parameters() * itemsize, routed=routed)

    @property
    def adapters(self) -> Weights:
        """Those of adapters."""
        counts = [(kind.count, *self.adapter_parameters(kind)) for kind in self.layers]
        others, routed = (sum(item[0] * item[part] for item in counts) for part in (1, 2))
        return Weights(config=self.config, others=others, routed=routed)

    @property
    def trained(self) -> Weights:
        """Those with gradients and optimizer state."""
        return self.weights if self.lora is None else self.adapters

    def outside_parameters(self) -> int:
        """Parameters outside the layers: embedding, norm, output; one embedding where the two are tied."""
        dims = self.dims(1, 1)
        total = sum(weight_elements(op, dims) for op in self.outside.operators)
        return total - (dims["w"] * dims["h"] if self.config.tie_embeddings else 0)

    def parameters(self) -> int:
        """All parameters of the model, without adapters."""
        layers = sum(kind.count * sum(self.layer_parameters(kind)) for kind in self.layers)
        return layers + self.outside_parameters()


def build_workload(
    config: ModelConfig,
    extra: Mapping[str, tuple[str, ...]] | None = None,
    without: tuple[str, ...] = (),
    lora: LoraSettings | None = None,
) -> Workload:
    """List the operators of ``config``'s model.

    Args:
        extra: names of registered operators to append to a layer kind (one of the family's, or ``outside``): a model
            with an operator of the user's own.
        without: names of operators to leave out, those that such an operator replaces.
        lora: adapters to train, with all other weights frozen.

    Raises ConfigError for a layer kind, an operator, a dim of one or a target of adapters that is not known.
    """
    family = family_of(config)
    names = {layers.name: layers.operators for layers in family.layers(config)} | {OUTSIDE: family.outside}
    indices = {layers.name: layers.indices for layers in family.layers(config)} | {OUTSIDE: (0,)}
    _check_names(names, extra or {}, without)
    kinds = {
        kind: LayerKind(
            name=kind,
            operators=tuple(operator(n) for n in (*listed, *(extra or {}).get(kind, ())) if n not in without),
            indices=indices[kind],
        )
        for kind, listed in names.items()
    }
    layers = tuple(kind for kind in kinds.values() if kind.name != OUTSIDE and kind.count)
    workload = Workload(config=config, layers=layers, outside=kinds[OUTSIDE])
    dims = workload.dims(1, 1)
    for kind in kinds.values():
        for op in kind.operators:
            check_dims(op, dims)
    return workload if lora is None else with_adapters(workload, lora)


def with_adapters(workload: Workload, lora: LoraSettings) -> Workload:
    """Freeze the weights of ``workload`` and add adapters to it. Raises ConfigError for a target it does not have."""
    if workload.lora is not None:
        assert workload.lora == lora, "adapters are added once"
        return workload
    config = workload.config
    modules = (spot.module for kind in workload.layers for op in kind.operators for spot in op.adaptable)
    is_plain = not config.has_expert_biases and config.swiglu_clamp is None
    lora.check_targets(modules, has_plain_experts=is_plain)

    def adapted(kind: LayerKind) -> LayerKind:
        operators = []
        for op in kind.operators:
            spots = [spot for spot in op.adaptable if lora.has_target(spot.module)]
            operators += [_frozen(op, keeps_inputs=bool(spots)), *(_adapter(op, spot) for spot in spots)]
        return replace(kind, operators=tuple(operators))

    return replace(
        workload,
        layers=tuple(adapted(kind) for kind in workload.layers),
        outside=adapted(workload.outside),
        lora=lora,
    )


def _frozen(op: Operator, *, keeps_inputs: bool) -> Operator:
    """``op`` without the gradients of its weights. An adapter needs the inputs that they needed."""
    if not op.parsed.weights:
        return op
    saved = tuple(tensor for tensor in op.saved if keeps_inputs or not tensor.for_weight)
    # A look-up has no other gradient. Of a norm's, that of its gain is no work to speak of.
    bytes_ratio = 0.0 if op.is_lookup else op.backward_bytes_ratio
    return replace(op, saved=saved, backward_flops_ratio=op.backward_flops_ratio - 1, backward_bytes_ratio=bytes_ratio)


def _adapter(op: Operator, spot: Adaptable) -> Operator:
    """What is added to one weight of ``op``, limited by memory: a rank is few columns for a GEMM.

    A linear layer's input is read, and its result read and written once more. Backward the result's gradient is read
    twice, the input once, and the input's gradient read and written. Of routed experts the addition is made where the
    result is, and backward the rows of both sides are read: about four times what the forward reads, as wide as they
    are in fine-grained experts.
    """
    rank = f"{spot.parts if spot.parts > 1 else ''}{RANK_DIM}"
    if is_routed(op):
        annotation = f"r {spot.inputs}, e {rank} {spot.inputs}, e {spot.outputs} {rank} -> r {rank}"
        rows, ratio = "r", 4.0
    else:
        product = f"{rank} {spot.inputs}, {spot.outputs} {RANK_DIM}"
        annotation = f"n {spot.inputs}, {product}, n {spot.outputs} -> n {spot.outputs}"
        rows, ratio = "n", 1.5
    name = f"adapter {spot.module} {spot.inputs} to {spot.outputs}"
    return Operator(
        name=name,
        annotation=annotation,
        kind="elementwise",
        group="adapters",
        overlaps=op.overlaps,
        saved=(Saved(name=f"{name} on rank", dims=f"{rows} {rank}"),),
        backward_bytes_ratio=ratio,
        is_adapter=True,
    )


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
