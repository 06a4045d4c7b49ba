"""AdamW over a model's parameters, with gradients accumulated in the plan's format.

Every rank updates its part of each parameter, with the same rounding as a single device that holds all of it. If
several ranks hold a parameter whole, each updates some of its rows: gradients are reduced before, weights gathered
after. Parameters are kept in the compute dtype. The plan chooses the formats of master weights and moments, which
:mod:`moescale.kernels.adamw` implements.

The gradients of a bf16 parameter are accumulated over micro-batches in a buffer, in fp32, so that no sum is rounded to
bf16, or in bf16 if the plan says so. The GEMM that computes a gradient adds it (:meth:`AdamW.accumulate_in_gemms`), or
else a hook does once autograd has produced it. Gradients of fp32 adapters in a bf16 model are accumulated in the same
way, always in fp32. In an all-fp32 model autograd accumulates in place. Frozen parameters have neither state nor
gradient.
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
    """Formats of optimizer state and gradients."""

    moments: MomentFormat = "fp32"
    master: MasterFormat = "fp32"
    gradients: torch.dtype = torch.float32
    """Dtype in which gradients of bf16 parameters are accumulated."""
    offload: bool = False
    """Keep the state in host memory, and copy it to the device tensor by tensor in a step."""


class AdamW:
    """Optimizer state and updates of named parameters, of each of which this rank may hold only a part."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        settings: TrainSettings,
        format: OptimizerFormat = OptimizerFormat(),  # noqa: B008 - frozen
        *,
        parts: Mapping[str, Part] | None = None,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        """Use the trained ones of the parameters, and ignore the frozen ones.

        ``parts``: this rank's part of each parameter, from :func:`moescale.runtime.layout.find_parts`.
        """
        self.settings = settings
        self.format = format
        self.ranks = ranks
        everything = dict(named_parameters)
        self.parameters = {name: parameter for name, parameter in everything.items() if parameter.requires_grad}
        self.held = {
            name: parts[name] if parts else whole(parameter.shape) for name, parameter in self.parameters.items()
        }
        """The part of every parameter in this rank's memory."""
        self.parts = {name: self.held[name].own for name in self.parameters}
        """The part of every parameter that this rank updates."""
        self.weights = {
            name: self.held[name].own_rows(local_tensor(parameter)) for name, parameter in self.parameters.items()
        }
        """Views of the same parts in the parameters' memory."""
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
        """Raise ConfigError if the states of this host's ranks need more host memory than is available."""
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
        # The hook refers to the buffer alone: a circle through the optimizer would keep both and the model for ever.
        buffer = self._gradients[name] = torch.zeros_like(local_tensor(parameter), dtype=dtype)

        def add_to_buffer(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:  # None if the backward has added to the buffer itself
                buffer.add_(local_tensor(parameter.grad))
                parameter.grad = None

        parameter.register_post_accumulate_grad_hook(add_to_buffer)

    def accumulate_in_gemms(self, model: torch.nn.Module) -> None:
        """Make the GEMMs of ``model`` add their weight gradients to the buffers directly.

        Gradients of a weight sharded by FSDP2 are added once they are reduced.
        """
        for prefix, module in model.named_modules():
            set_buffers = getattr(module, "set_gradient_buffers", None)
            if set_buffers is not None:
                set_buffers(partial(self._buffer, f"{prefix}." if prefix else ""))

    def _buffer(self, prefix: str, name: str) -> torch.Tensor | None:
        parameter = self.parameters.get(prefix + name)
        return None if isinstance(parameter, DTensor) else self._gradients.get(prefix + name)

    def gradient(self, name: str) -> torch.Tensor:
        """Return the accumulated gradient of the part that this rank updates; zeros if there is none.

        After :meth:`sum_gradients` it is the sum over all ranks.
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
        """Sum the gradients of parts that several ranks hold, once per step. A collective."""
        for sharing, names in self._shared.items():
            sum_gradients([self._held_gradient(name) for name in names], sharing, on_progress)

    def _share_weights(self) -> None:
        for sharing, names in self._shared.items():
            share_weights([local_tensor(self.parameters[name]) for name in names], sharing, lambda: None)

    def gradient_norm(self) -> torch.Tensor:
        """Return the L2 norm of all ranks' gradients, an fp32 scalar on the device. A collective, one reduction."""
        gradients = [self.gradient(name) for name in self.parameters if self.parts[name].is_first_copy]
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32) if gradients else ()
        device = next(iter(self.weights.values())).device
        # In fp64, so that the sum is the same however ranks divide the tensors.
        squares = torch.stack([*norms, torch.zeros((), device=device)]).double().square().sum()
        return (squares if self.ranks.size == 1 else self.ranks.sum(squares)).sqrt().float()

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
            # A resumed run must repeat the rounding, so its seed derives from the step and the parameter's name.
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
        """Discard all accumulated gradients."""
        for name, parameter in self.parameters.items():
            if name in self._gradients:
                self._gradients[name].zero_()
            else:
                parameter.grad = None

    def master(self, name: str) -> torch.Tensor:
        """Return the fp32 weight of this rank's part of a parameter; a copy unless it is stored as fp32."""
        weight, state = self.weights[name], self.states[name]
        return master_weight(weight, _on_device(state, weight) if self.format.offload else state)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return this rank's part of everything a checkpoint must hold, as ``KIND.NAME``.

        Kinds: ``weights`` (the fp32 master, or the bf16 parameter if there is none), and the tensors present in
        :class:`~moescale.kernels.adamw.AdamWState`: remainder, moments and their scales.
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
        """Return the parts of the :meth:`tensors`. Blocks of the 8-bit format lie along rows, which are not sharded."""
        parts = {}
        for key, tensor in self.tensors().items():
            part = self.parts[key.partition(".")[2]]
            width = tensor.shape[-1]
            if width != part.index[-1].stop - part.index[-1].start:  # scales of blocks, with whole rows
                assert part.index[-1] == slice(0, part.shape[-1])
                part = replace(part, shape=(*part.shape[:-1], width), index=(*part.index[:-1], slice(0, width)))
            parts[key] = part
        return parts

    def finish_load(self, num_updates: int) -> None:
        """Set the update count and refresh the parameters, after :meth:`tensors` were overwritten."""
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
    """Yield the part as contiguous ranges of the whole tensor, each with the index of its first element.

    There is one range, or one per expert if the rows of stacked experts are sharded.
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
    """Return ``state`` in (pinned) host memory; a master that is the parameter itself stays on the device."""
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
