"""Every operator's annotation: its named dims, once, for planner and runtime alike. Imports no torch.

An operator is declared by how its tensors' dims are named, in the order in which it takes and returns them::

    "n h, 2f h -> n 2f"            a linear layer from h to 2f features, on n tokens
    "n h, e 2f h, e h f -> n h"    routed experts

A number in front of a dim is a factor. Operands that carry no token dim are weights. From the annotation follow

- what a dim may be split over (:func:`splits`): token dims over the data axes, which costs gathering weights and
  reducing their gradients; the expert dim of weights, where it is summed away, over ``ep``, which costs sending rows
  both ways; a weight's feature dim over ``tp``, which costs nothing where it survives to the output and an all-reduce
  of the output where it is summed away, unless the operator says that ``tp`` replicates it: a norm needs its whole row;
- which weights are routed (:func:`routed_weight_elements`): those with an expert dim that ``ep`` splits. A router's
  expert dim survives to its output, for every token meets all of it: its weights are ordinary ones;
- the bytes an operator moves, and for matrix products the FLOPs (:func:`forward_flops`).

What cannot be read off the annotation is declared with it: which tensors the backward keeps, FLOPs of operators that
are not plain GEMMs, what overlaps with communication, what may be recomputed alone, and the kind of kernel, by which a
cluster file tells how fast it runs. The planner reads these and knows no operator by name. :func:`register` adds an
operator; a layer that lists it (``planner.workload``) is planned like any other.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn, get_args

from moescale.errors import ConfigError

Dims = Mapping[str, int]
"""Sizes by dim name."""
Kind = Literal["dense_gemm", "grouped_gemm", "attention", "elementwise"]
TOKEN_DIMS = ("n", "r", "b")
"""n tokens of a micro-batch; r routed rows, n times the experts each token goes to; b sequences."""
EXPERT_DIM = "e"
_TERM = re.compile(r"(\d*)([a-z]\w*)$")


@dataclass(frozen=True)
class Tensor:
    """The dims of one operand: names and the factors in front of them."""

    terms: tuple[tuple[int, str], ...]

    @classmethod
    @functools.cache
    def parse(cls, text: str) -> Tensor:
        """``"n 2f"`` -> n times 2f. Raises ConfigError where a term is no name with an optional factor."""
        terms = []
        for word in text.split():
            match = _TERM.match(word)
            if match is None:
                raise ConfigError(f"annotation term '{word}' must be a dim name, with a factor in front or not")
            terms.append((int(match[1] or 1), match[2]))
        return cls(tuple(terms))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for _, name in self.terms)

    @property
    def is_weight(self) -> bool:
        return not self.names & set(TOKEN_DIMS)

    def size(self, dims: Dims) -> int:
        """Number of elements."""
        return math.prod(factor * dims[name] for factor, name in self.terms)


@dataclass(frozen=True)
class Annotation:
    """The operands and results of an operator."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @classmethod
    @functools.cache  # a search asks for the same few hundreds of thousands of times
    def parse(cls, text: str) -> Annotation:
        left, arrow, right = text.partition("->")
        if not arrow:
            raise ConfigError(f"annotation '{text}' must have the form 'inputs -> outputs'")
        inputs, outputs = (tuple(Tensor.parse(part) for part in side.split(",")) for side in (left, right))
        known = frozenset[str]().union(*(tensor.names for tensor in inputs))
        for tensor in outputs:
            if tensor.names - known:
                raise ConfigError(f"annotation '{text}': output dim '{min(tensor.names - known)}' is in no input")
        return cls(inputs, outputs)

    @functools.cached_property
    def weights(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in self.inputs if tensor.is_weight)

    @functools.cached_property
    def is_routed(self) -> bool:
        """Whether a weight has an expert dim that is summed away."""
        has_expert_dim = any(EXPERT_DIM in tensor.names for tensor in self.weights)
        return has_expert_dim and not any(EXPERT_DIM in tensor.names for tensor in self.outputs)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A tensor that stays in memory from the forward to the backward pass."""

    name: str
    """Equal names within a layer are one tensor, kept once."""
    dims: str
    itemsize: int | None = None
    """Bytes per element; None: that of the compute dtype."""
    for_weight: bool = False
    """Only the gradient of the operator's weight needs it: with the weight frozen it is not kept."""


@dataclass(frozen=True, kw_only=True)
class Adaptable:
    """A weight that a low-rank adapter can be added to."""

    module: str
    """The module that has it, by its path within a layer."""
    inputs: str
    """Dims that it sums away."""
    outputs: str
    """Dims that it results in."""
    parts: int = 1
    """Stacked weights, each with an adapter of its own."""


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """What it saves and costs to recompute an operator alone, which a plan can then ask for by the operator's name."""

    drops: tuple[str, ...]
    """Saved tensors that are not kept then."""
    forward_share: float
    """Part of the operator's forward that runs again in the backward."""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """What the planner knows of an operator."""

    name: str
    annotation: str
    kind: Kind
    group: str | None = None
    """Operators of one group are one line of an explanation; None: a line of its own."""
    tp: Literal["shard", "replicate"] = "shard"
    """Whether tensor parallelism shards the operator's work, or every rank does all of it."""
    overlaps: Literal["ep"] | None = None
    """The axis whose communication runs at the same time as this operator, which needs none of its results."""
    recompute: Recompute | None = None
    """None: recomputed with its whole block or not at all."""
    is_lookup: bool = False
    """Reads one row of its weight per token, not the whole weight."""
    saved: tuple[Saved, ...] = ()
    flops: Callable[[Dims], float] | None = None
    """Forward FLOPs; None: those of the product the annotation describes (0 for element-wise operators)."""
    backward_flops_ratio: float = 2.0
    """Backward over forward FLOPs: a product needs one product per operand."""
    backward_bytes_ratio: float = 2.0
    """Backward over forward bytes moved, for operators limited by memory."""
    norm: str | None = None
    """The operator whose result it reads, where that is a norm: if products in fp8 read it, the norm quantises it."""
    fp8_bytes_shares: tuple[float, float] = (1.0, 1.0)
    """Of those limited by memory: the share of its bytes, forward and backward, where experts multiply in fp8, or those
    that it is between."""
    between: tuple[str, str] | None = None
    """Of an activation, the operators in front and behind. Where both multiply in fp8 it quantises its result and its
    gradient for them, and its result is not kept but made again."""
    adaptable: tuple[Adaptable, ...] = ()
    """Its weights that an adapter can be added to; others can only be frozen."""
    is_adapter: bool = False
    """It is one: trained, in fp32, while other weights are frozen."""

    @property
    def parsed(self) -> Annotation:
        return Annotation.parse(self.annotation)


Communication = Literal["gather_weights_reduce_gradients", "all_to_all", "all_reduce_output", "none"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """A dim of an operator, a mesh axis that may split it, and the communication that costs."""

    dim: str
    axis: Literal["dp", "ep", "tp"]
    communication: Communication


def splits(operator: Operator) -> tuple[Split, ...]:
    """Every dim that a mesh axis may split, by the rules in this module's docstring."""
    annotation = operator.parsed
    weights = frozenset[str]().union(*(tensor.names for tensor in annotation.weights))
    results = frozenset[str]().union(*(tensor.names for tensor in annotation.outputs))
    found: dict[str, Split] = {}
    for tensor in annotation.inputs:
        for _, dim in tensor.terms:
            if dim in TOKEN_DIMS:
                cost: Communication = "gather_weights_reduce_gradients" if annotation.weights else "none"
                found[dim] = Split(dim=dim, axis="dp", communication=cost)
            elif dim == EXPERT_DIM and annotation.is_routed:
                found[dim] = Split(dim=dim, axis="ep", communication="all_to_all")
            elif dim in weights and operator.tp == "shard":
                survives = dim in results
                found[dim] = Split(dim=dim, axis="tp", communication="none" if survives else "all_reduce_output")
    return tuple(found.values())


def check_dims(operator: Operator, dims: Dims) -> None:
    """Raise ConfigError for a dim of the operator, or of what it saves, that ``dims`` does not know."""
    parsed = operator.parsed
    saved = (Tensor.parse(tensor.dims) for tensor in operator.saved)
    for tensor in (*parsed.inputs, *parsed.outputs, *saved):
        for name in sorted(tensor.names - dims.keys()):
            _refuse_dim(operator, name, dims)
    try:
        forward_flops(operator, dims)
    except KeyError as error:
        _refuse_dim(operator, str(error.args[0]), dims)


def _refuse_dim(operator: Operator, dim: str, dims: Dims) -> NoReturn:
    raise ConfigError(
        f"operator '{operator.name}': dim '{dim}' is not known to the workload; known are {', '.join(sorted(dims))}"
    ) from None


def weight_elements(operator: Operator, dims: Dims) -> int:
    """Parameters of the operator."""
    return sum(tensor.size(dims) for tensor in operator.parsed.weights)


def is_routed(operator: Operator) -> bool:
    """Whether tokens meet only some of the operator's weights: those of the experts they are sent to."""
    return operator.parsed.is_routed


def routed_weight_elements(operator: Operator, dims: Dims) -> int:
    """Parameters of the operator that belong to experts, which ``ep`` divides."""
    if not is_routed(operator):
        return 0
    return sum(tensor.size(dims) for tensor in operator.parsed.weights if EXPERT_DIM in tensor.names)


def forward_flops(operator: Operator, dims: Dims) -> float:
    """FLOPs of the forward pass; 0 of element-wise work, of products 2 for every combination of their dims.

    An operator with several weights is one product with each of them, in their order. A routed weight meets each token
    in ``k`` of its ``e`` experts.
    """
    if operator.flops is not None:
        return operator.flops(dims)
    if operator.kind == "elementwise":
        return 0.0
    if is_routed(operator):
        dims = {**dims, EXPERT_DIM: dims["k"]}
    annotation = operator.parsed
    sizes = {name: factor * dims[name] for tensor in reversed(annotation.inputs) for factor, name in tensor.terms}
    return sum(
        2.0 * weight.size(dims) * math.prod(sizes[name] for name in _batch_dims(annotation, index))
        for index, weight in enumerate(annotation.weights)
    )


def _batch_dims(annotation: Annotation, index: int) -> frozenset[str]:
    """Dims for each of whose combinations the weight of that index is used once.

    They are the dims of what it is multiplied with that it does not have itself. In a chain of products that operand is
    not named: it has what came before and was not summed away yet, because the result has it or a weight behind does.
    """
    weight, activation = annotation.weights[index], annotation.inputs[0]
    if index == 0:
        return activation.names - weight.names
    before = (activation, *annotation.weights[:index])
    times = Counter(name for tensor in before for name in tensor.names)
    later = frozenset[str]().union(*(tensor.names for tensor in annotation.weights[index + 1 :]))
    results = frozenset[str]().union(*(tensor.names for tensor in annotation.outputs))
    unsummed = {name for name, count in times.items() if count == 1 and name in later | results}
    return frozenset(unsummed | (times.keys() & results - later)) - weight.names


def moved_bytes(operator: Operator, dims: Dims, itemsize: int) -> float:
    """Bytes read and written by the forward pass: every operand and result once."""
    annotation = operator.parsed
    return float(sum(tensor.size(dims) for tensor in (*annotation.inputs, *annotation.outputs)) * itemsize)


_REGISTRY: dict[str, Operator] = {}


def register(operator: Operator) -> Operator:
    """Make an operator known by its name, and return it. Raises ConfigError for a wrong annotation or a taken name."""
    parsed = operator.parsed
    if operator.kind not in get_args(Kind):
        known = ", ".join(get_args(Kind))
        raise ConfigError(f"operator '{operator.name}': kind ('{operator.kind}') must be one of {known}")
    for saved in operator.saved:
        Tensor.parse(saved.dims)
    if operator.flops is None and operator.kind != "elementwise" and not parsed.weights:
        raise ConfigError(f"operator '{operator.name}': needs `flops`, its annotation is no product with a weight")
    if operator.name in _REGISTRY and _REGISTRY[operator.name] != operator:
        raise ConfigError(f"operator '{operator.name}' is already registered; choose another name")
    _REGISTRY[operator.name] = operator
    return operator


def operator(name: str) -> Operator:
    """The registered operator of that name. Raises ConfigError where there is none."""
    if name not in _REGISTRY:
        raise ConfigError(f"operator '{name}' is not registered; known are {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]
