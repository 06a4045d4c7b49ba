"""What a low-rank adaptation (LoRA, Hu et al. 2021, arXiv:2106.09685) trains, and how. Imports no torch.

An adapter adds ``scale * B @ A`` to a frozen weight. Which weights get one is said by *targets*: a group of modules
(:data:`GROUPS`), or a module by the end of its path within a layer, such as ``q_proj`` or ``shared_experts.down``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast, get_args

from moescale.errors import ConfigError, nearest
from moescale.formats import FrozenFormat

GROUPS: dict[str, tuple[str, ...]] = {
    "all": ("",),
    "attention": ("attention.",),
    "dense": ("feed_forward.gate_up", "feed_forward.down"),
    "shared": ("feed_forward.shared_experts.",),
    "experts": ("feed_forward.experts",),
}
"""Targets that stand for several modules: what their paths within a layer begin with."""
MAX_RANK = 2**14
"""A rank beyond a layer's width adapts it no further; the widest models have half of this."""
MIN_ALPHA, MAX_ALPHA = 1e-6, 1e6
"""Beyond these an adapter adds nothing, or nothing but overflow."""
EXPERTS = "feed_forward.experts"
"""The path of a layer's routed experts."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Adapters of a training run; all other weights are frozen."""

    rank: int
    """Columns of B and rows of A; of routed experts, for each of them."""
    alpha: float
    """The scale of what an adapter adds is alpha / rank."""
    targets: tuple[str, ...] = ("all",)
    """Groups or modules, see :mod:`moescale.lora`."""
    dropout: float = 0.0
    """Probability with which an input of A is dropped in training; 0 where routed experts are among the targets."""
    rank_stabilised: bool = False
    """The scale is alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)."""
    base: FrozenFormat = "compute"
    """How the frozen weights of linear layers and routed experts are kept: in the compute dtype, or in fp8."""

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_RANK:
            raise ConfigError(f"lora.rank ({self.rank}) must be at least 1 and at most {MAX_RANK}; 16 is common")
        if not MIN_ALPHA <= self.alpha <= MAX_ALPHA:
            raise ConfigError(
                f"lora.alpha ({self.alpha:g}) must be at least {MIN_ALPHA:g} and at most {MAX_ALPHA:g}; leave it out "
                "for twice the rank"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout ({self.dropout}) must be at least 0 and below 1; 0 drops nothing")
        if not self.targets:
            raise ConfigError(f"lora.targets must name at least one of {', '.join(GROUPS)}, or a module of a layer")

        if self.base not in get_args(FrozenFormat):
            raise ConfigError(
                f"lora.base ({self.base!r}) must be compute, the compute dtype of the plan, or fp8"
                f"{nearest(str(self.base), get_args(FrozenFormat))}"
            )

    @property
    def scale(self) -> float:
        """The factor on ``B @ A``."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def text(self) -> str:
        """The settings as ``--lora`` takes them."""
        words = [f"rank={self.rank}", f"alpha={self.alpha:g}", f"targets={'+'.join(self.targets)}"]
        words += [f"dropout={self.dropout:g}"] if self.dropout else []
        words += ["rank_stabilised=true"] if self.rank_stabilised else []
        words += [f"base={self.base}"] if self.base != "compute" else []
        return ",".join(words)

    def has_target(self, path: str) -> bool:
        """Whether the module at ``path`` within a layer gets an adapter."""
        return any(_matches(target, path) for target in self.targets)

    def check_targets(self, paths: Iterable[str], *, has_plain_experts: bool) -> None:
        """Raise ConfigError for a target that is none of a model whose layers have the modules ``paths``.

        ``has_plain_experts``: its routed experts have neither biases nor a clamped activation, for which there is no
        operator with adapters.
        """
        paths = sorted(set(paths))
        if EXPERTS in paths and not has_plain_experts and self.has_target(EXPERTS):
            raise ConfigError(
                f"lora.targets ({'+'.join(self.targets)}) must leave out the routed experts of this model, which have "
                "biases or a clamped activation; give targets=attention"
            )
        for target in self.targets:
            if not any(_matches(target, path) for path in paths):
                known = [*(group for group in GROUPS if any(_matches(group, path) for path in paths)), *paths]
                frozen = "; router, norms, embedding and output stay frozen" if "router" in target else ""
                raise ConfigError(
                    f"lora.targets ('{target}') must be one of {', '.join(known)}, or the end of such a path"
                    f"{frozen}{nearest(target, known)}"
                )
        if self.dropout and EXPERTS in paths and self.has_target(EXPERTS):
            raise ConfigError(
                f"lora.dropout ({self.dropout}) must be 0 where routed experts are among lora.targets "
                f"({'+'.join(self.targets)}): PEFT has none there either; drop one of the two"
            )


def _matches(target: str, path: str) -> bool:
    if target in GROUPS:
        return path.startswith(GROUPS[target])
    return path == target or path.endswith(f".{target}")


def parse_lora(text: str) -> LoraSettings:
    """Read ``rank=16,alpha=32,targets=attention+experts``; alpha is twice the rank by default.

    Raises ConfigError.
    """
    values: dict[str, str] = {}
    names = [field.name for field in dataclasses.fields(LoraSettings)]
    for word in text.split(","):
        name, equals, value = (part.strip() for part in word.partition("="))
        name = name.replace("-", "_")
        if not equals or not value or name not in names:
            raise ConfigError(
                f"lora ('{word.strip()}') must be name=value, as in rank=16,alpha=32,targets=attention+experts; names "
                f"are {', '.join(names)}{'' if name in names else nearest(name, names)}"
            )
        if name in values:
            raise ConfigError(f"lora.{name} is given twice ({values[name]}, {value}); keep one of them")
        values[name] = value
    if "rank" not in values:
        raise ConfigError(f"lora ('{text}') lacks a rank; give one, for example rank=16")
    rank = int(_number("rank", values["rank"], int))
    return LoraSettings(
        rank=rank,
        alpha=_number("alpha", values["alpha"], float) if "alpha" in values else 2.0 * rank,
        targets=tuple(dict.fromkeys(values.get("targets", "all").split("+"))),
        dropout=_number("dropout", values.get("dropout", "0"), float),
        rank_stabilised=_flag("rank_stabilised", values.get("rank_stabilised", "false")),
        base=cast(FrozenFormat, values.get("base", "compute")),
    )


def _number(name: str, text: str, kind: type) -> int | float:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"lora.{name} ('{text}') must be a{' whole' if kind is int else ''} number") from None


def _flag(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise ConfigError(f"lora.{name} ('{text}') must be true or false")
    return text == "true"
