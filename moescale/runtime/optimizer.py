"""AdamW over a model's parameters, with gradients accumulated as the plan says.

Every rank updates its part of each parameter, and rounds as one device would that holds it all. Of a parameter that
several ranks hold whole, each updates some rows: gradients are summed before, weights handed round after.
Parameters are kept in the compute dtype; what stands beside them (master weights, moments, in which formats) is the
plan's choice and :mod:`moescale.kernels.adamw`'s work. The gradient of each micro-batch of a bf16 parameter is added to
a buffer, by the product that makes it (:meth:`AdamW.accumulate_in_products`) or as soon as autograd has produced it: in
fp32, so that no sum is rounded to bf16, or in bf16 where the plan says so. So are those of fp32 adapters in a bf16
model, always in fp32. In a model that is all fp32, autograd accumulates in place. Frozen parameters have neither state
nor gradient.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.distributed.tensor import DTensor

from moescale.errors import CheckpointError, ConfigError
from moescale.formats import MasterFormat, MomentFormat
from moescale.kernels.adamw import (
    AdamWHyperparameters,
    AdamWState,
    adamw_update,
    init_adamw_state,
    master_weight,
    set_master_weight,
)
from moescale.runtime.device import available_host_bytes
from moescale.runtime.layout import Part, Sharing, local_tensor, whole
from moescale.runtime.ranks import ONE_RANK, Ranks, place_on_host
from moescale.runtime.settings import TrainSettings
from moescale.runtime.zero import share_weights, sum_gradients


@dataclass(frozen=True, kw_only=True)
class OptimizerFormat:
    """In which formats the optimizer keeps what it keeps."""

    moments: MomentFormat = "fp32"
    master: MasterFormat = "fp32"
    gradients: torch.dtype = torch.float32
    """Dtype in which gradients of bf16 parameters are accumulated."""
    offload: bool = False
    """Keep the state in host memory; it visits the device tensor by tensor in a step."""


class AdamW:
    """Optimizer state and update of a set of named parameters, of which this rank may hold a part each."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        settings: TrainSettings,
        format: OptimizerFormat = OptimizerFormat(),  # noqa: B008 - frozen
        *,
        parts: Mapping[str, Part] | None = None,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        """Take those that are trained; others have no part in anything.

        ``parts``: what of each parameter this rank holds, from :func:`moescale.runtime.layout.find_parts`.
        """
        self.settings = settings
        self.format = format
        self.ranks = ranks
        everything = dict(named_parameters)
        self.parameters = {name: parameter for name, parameter in everything.items() if parameter.requires_grad}
        self.held = {
            name: parts[name] if parts else whole(parameter.shape) for name, parameter in self.parameters.items()
        }
        """What of every parameter is in this rank's memory."""
        self.parts = {name: self.held[name].own for name in self.parameters}
        """What of every parameter this rank updates."""
        self.weights = {
            name: self.held[name].own_rows(local_tensor(parameter)) for name, parameter in self.parameters.items()
        }
        """The same, in the parameter's own memory."""
        self._shared: dict[Sharing, list[str]] = {}
        for name, part in self.held.items():
            if part.sharing is not None and (part.sharing.shards or part.sharing.replicas):
                self._shared.setdefault(part.sharing, []).append(name)
        self.states: dict[str, AdamWState] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        self.num_updates = 0
        if format.offload:
            self._check_host_memory()
        for name, parameter in self.parameters.items():
            state = init_adamw_state(self.weights[name], format.moments, format.master)
            self.states[name] = _on_host(state, self.weights[name]) if format.offload else state
            if any(parameter.dtype != torch.float32 for parameter in everything.values()):
                self._accumulate_in_buffer(name, parameter)

    def _check_host_memory(self) -> None:
        """Raise ConfigError where the states of this machine's ranks need more host memory than there is."""
        on_meta = (torch.empty_like(weight, device="meta") for weight in self.weights.values())
        states = (init_adamw_state(weight, self.format.moments, self.format.master) for weight in on_meta)
        size = sum(tensor.nbytes for state in states for tensor in state.tensors().values())
        _, local_ranks = place_on_host()
        available = available_host_bytes()
        if size * local_ranks > available:
            raise ConfigError(
                f"plan.offload_optimizer: states of {size * local_ranks / 2**30:.1f} GiB (ranks on this host: "
                f"{local_ranks}) exceed the {available / 2**30:.1f} GiB of memory it has left; compile with --forbid "
                "offload_optimizer=true, or with this host's memory per GPU in the cluster file (host_memory_bytes)"
            )

    def _accumulate_in_buffer(self, name: str, parameter: torch.nn.Parameter) -> None:
        dtype = torch.float32 if parameter.dtype == torch.float32 else self.format.gradients
        self._gradients[name] = torch.zeros_like(local_tensor(parameter), dtype=dtype)

        def add_to_buffer(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:  # None where the backward has added to the buffer itself
                self._gradients[name].add_(local_tensor(parameter.grad))
                parameter.grad = None

        parameter.register_post_accumulate_grad_hook(add_to_buffer)

    def accumulate_in_products(self, model: torch.nn.Module) -> None:
        """Have the GEMMs of ``model`` add their weight gradients to the buffers by themselves.

        Those of a weight sharded by FSDP2 are added once they are reduced.
        """
        for prefix, module in model.named_modules():
            set_buffers = getattr(module, "set_gradient_buffers", None)
            if set_buffers is not None:
                set_buffers(partial(self._buffer, f"{prefix}." if prefix else ""))

    def _buffer(self, prefix: str, name: str) -> torch.Tensor | None:
        parameter = self.parameters.get(prefix + name)
        return None if isinstance(parameter, DTensor) else self._gradients.get(prefix + name)

    def gradient(self, name: str) -> torch.Tensor:
        """The gradient accumulated so far for what this rank updates; zeros where nothing has reached it.

        The sum over all ranks from :meth:`sum_gradients` on.
        """
        return self.held[name].own_rows(self._held_gradient(name))

    def _held_gradient(self, name: str) -> torch.Tensor:
        if name in self._gradients:
            return self._gradients[name]
        parameter = self.parameters[name]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return local_tensor(parameter.grad)

    def sum_gradients(self, on_progress: Callable[[], None] = lambda: None) -> None:
        """Sum the gradients of what several ranks hold, once a step. A collective."""
        for sharing, names in self._shared.items():
            sum_gradients([self._held_gradient(name) for name in names], sharing, on_progress)

    def _share_weights(self) -> None:
        for sharing, names in self._shared.items():
            share_weights([local_tensor(self.parameters[name]) for name in names], sharing, lambda: None)

    def gradient_norm(self) -> torch.Tensor:
        """L2 norm over all gradients of all ranks: fp32 scalar on their device. A collective, one reduction."""
        gradients = [self.gradient(name) for name in self.parameters if self.parts[name].is_first_copy]
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32) if gradients else ()
        if self.ranks.size == 1:
            return torch.linalg.vector_norm(torch.stack(list(norms)))
        device = next(iter(self.weights.values())).device
        squares = torch.stack([*norms, torch.zeros((), device=device)]).square().sum()
        return self.ranks.sum(squares).sqrt()

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_norm: torch.Tensor) -> None:
        """Clip to ``settings.gradient_clip`` given the norm, update weights and states, and clear the gradients."""
        scale = torch.ones_like(gradient_norm)
        if self.settings.gradient_clip:
            scale = (self.settings.gradient_clip / (gradient_norm + 1e-6)).clamp(max=1.0)
        self.num_updates += 1
        for name, weight in self.weights.items():
            hyperparameters = AdamWHyperparameters(
                learning_rate=learning_rate,
                beta1=self.settings.beta1,
                beta2=self.settings.beta2,
                eps=self.settings.eps,
                weight_decay=self.settings.weight_decay if weight.dim() > 1 else 0.0,
                num_updates=self.num_updates,
            )
            # Rounding must repeat on a resumed run: its seed is made of the step and the parameter's name.
            seed = zlib.crc32(f"{self.settings.seed}/{self.num_updates}/{name}".encode())
            kept = self.states[name]
            state = _on_device(kept, weight) if self.format.offload else kept
            for piece, gradient, piece_state, first_index in _runs(
                weight, self.gradient(name), state, self.parts[name]
            ):
                adamw_update(
                    piece,
                    gradient,
                    piece_state,
                    hyperparameters,
                    gradient_scale=scale,
                    seed=seed,
                    first_index=first_index,
                )
            if self.format.offload:
                _copy_state(state, kept)
        self._share_weights()
        self.zero_gradients()

    def zero_gradients(self) -> None:
        """Forget every accumulated gradient."""
        for name, parameter in self.parameters.items():
            if name in self._gradients:
                self._gradients[name].zero_()
            else:
                parameter.grad = None

    def master(self, name: str) -> torch.Tensor:
        """The fp32 weight of this rank's part of a parameter; a copy unless it is kept as such."""
        weight, state = self.weights[name], self.states[name]
        return master_weight(weight, _on_device(state, weight) if self.format.offload else state)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything a checkpoint must hold, as ``KIND.NAME``; of each this rank's part.

        Kinds: ``weights`` (the fp32 master, or the bf16 parameter where there is none), and of
        :class:`~moescale.kernels.adamw.AdamWState` those there are: remainder, moments and their scales.
        """
        tensors = {}
        for name, weight in self.weights.items():
            state = self.states[name]
            tensors[f"weights.{name}"] = weight if state.master is None else state.master
            for kind, tensor in state.tensors().items():
                if kind != "master":
                    tensors[f"{kind}.{name}"] = tensor
        return tensors

    def tensor_parts(self) -> dict[str, Part]:
        """Which parts the :meth:`tensors` are. Blocks of the 8-bit format run along rows, which no rank cuts."""
        parts = {}
        for key, tensor in self.tensors().items():
            part = self.parts[key.partition(".")[2]]
            width = tensor.shape[-1]
            if width != part.index[-1].stop - part.index[-1].start:  # scales of blocks, in whole rows
                assert part.index[-1] == slice(0, part.shape[-1])
                part = replace(part, shape=(*part.shape[:-1], width), index=(*part.index[:-1], slice(0, width)))
            parts[key] = part
        return parts

    def finish_load(self, num_updates: int) -> None:
        """Called after :meth:`tensors` were overwritten: set the update count, refresh the parameters."""
        if num_updates < 0:
            raise CheckpointError(f"optimizer update count ({num_updates}) must not be negative")
        self.num_updates = num_updates
        for name, weight in self.weights.items():
            state = self.states[name]
            if state.master is not None:
                set_master_weight(weight, state, state.master)
        self._share_weights()


def _runs(
    weight: torch.Tensor, gradient: torch.Tensor, state: AdamWState, part: Part
) -> Iterator[tuple[torch.Tensor, torch.Tensor, AdamWState, int]]:
    """The part as runs of elements that follow each other in the whole tensor, with the index of each one's first.

    One run, unless rows of stacked experts are divided: then one per expert.
    """
    if part.is_contiguous:
        yield weight, gradient.contiguous(), state, part.first_index
        return
    assert weight.dim() == 3
    for number in range(weight.shape[0]):
        expert = part.index[0].start + number
        run = replace(part, index=(slice(expert, expert + 1), *part.index[1:]))
        pieces = {name: tensor[number] for name, tensor in state.tensors().items()}
        yield weight[number], gradient[number].contiguous(), replace(state, **pieces), run.first_index


def _on_host(state: AdamWState, weight: torch.Tensor) -> AdamWState:
    """``state`` in (pinned) host memory; a master that is the parameter itself stays where it is."""
    pin = weight.device.type == "cuda"
    moved = {
        name: tensor if tensor.data_ptr() == weight.data_ptr() else tensor.cpu().pin_memory() if pin else tensor.cpu()
        for name, tensor in state.tensors().items()
    }
    return replace(state, **moved)


def _on_device(state: AdamWState, weight: torch.Tensor) -> AdamWState:
    moved = {name: tensor.to(weight.device, non_blocking=True) for name, tensor in state.tensors().items()}
    return replace(state, **moved)


def _copy_state(source: AdamWState, target: AdamWState) -> None:
    for name, tensor in source.tensors().items():
        kept = target.tensors()[name]
        if kept is not tensor:
            kept.copy_(tensor, non_blocking=True)
