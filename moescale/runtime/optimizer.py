"""AdamW over a model's parameters, with gradients accumulated as the plan says.

Parameters are kept in the compute dtype; what stands beside them (master weights, moments, in which formats) is the
plan's choice and :mod:`moescale.kernels.adamw`'s work. The gradient of each micro-batch of a bf16 parameter is added to
a buffer as soon as autograd has produced it: in fp32, so that no sum is rounded to bf16, or in bf16 where the plan says
so. For fp32 parameters autograd accumulates in place.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from moescale.errors import CheckpointError
from moescale.kernels.adamw import (
    AdamWHyperparameters,
    AdamWState,
    MasterFormat,
    MomentFormat,
    adamw_update,
    init_adamw_state,
    master_weight,
    set_master_weight,
)
from moescale.model.moe import RoutedExperts
from moescale.runtime.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class OptimizerFormat:
    """In which formats the optimizer keeps what it keeps."""

    moments: MomentFormat = "fp32"
    master: MasterFormat = "fp32"
    gradients: torch.dtype = torch.float32
    """Dtype in which gradients of bf16 parameters are accumulated."""


class AdamW:
    """Optimizer state and update of a set of named parameters."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        settings: TrainSettings,
        format: OptimizerFormat = OptimizerFormat(),  # noqa: B008 - frozen
    ) -> None:
        self.settings = settings
        self.format = format
        self.parameters = dict(named_parameters)
        self.states: dict[str, AdamWState] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        self.num_updates = 0
        for name, parameter in self.parameters.items():
            self.states[name] = init_adamw_state(parameter.detach(), format.moments, format.master)
            if parameter.dtype != torch.float32:
                self._accumulate_in_buffer(name, parameter)

    def _accumulate_in_buffer(self, name: str, parameter: torch.nn.Parameter) -> None:
        self._gradients[name] = torch.zeros_like(parameter, dtype=self.format.gradients)

        def add_to_buffer(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:  # None where the backward has added to the buffer itself
                self._gradients[name].add_(parameter.grad)
                parameter.grad = None

        parameter.register_post_accumulate_grad_hook(add_to_buffer)

    def accumulate_in_experts(self, model: torch.nn.Module) -> None:
        """Have the routed experts of ``model`` add their weight gradients to the buffers inside the product itself."""
        for prefix, module in model.named_modules():
            if isinstance(module, RoutedExperts):
                module.gate_up_gradient = self._gradients.get(f"{prefix}.gate_up")
                module.down_gradient = self._gradients.get(f"{prefix}.down")

    def gradient(self, name: str) -> torch.Tensor:
        """The gradient accumulated so far, with the parameter's shape; zeros where nothing has reached it."""
        if name in self._gradients:
            return self._gradients[name]
        parameter = self.parameters[name]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def gradient_norm(self) -> torch.Tensor:
        """L2 norm over all gradients: fp32 scalar on their device."""
        gradients = [self.gradient(name) for name in self.parameters]
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        return torch.linalg.vector_norm(torch.stack(list(norms)))

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_norm: torch.Tensor) -> None:
        """Clip to ``settings.gradient_clip`` given the norm, update weights and states, and clear the gradients."""
        scale = torch.ones_like(gradient_norm)
        if self.settings.gradient_clip:
            scale = (self.settings.gradient_clip / (gradient_norm + 1e-6)).clamp(max=1.0)
        self.num_updates += 1
        for name, parameter in self.parameters.items():
            hyperparameters = AdamWHyperparameters(
                learning_rate=learning_rate,
                beta1=self.settings.beta1,
                beta2=self.settings.beta2,
                eps=self.settings.eps,
                weight_decay=self.settings.weight_decay if parameter.dim() > 1 else 0.0,
                num_updates=self.num_updates,
            )
            # Rounding must repeat on a resumed run: its seed is made of the step and the parameter's name.
            seed = zlib.crc32(f"{self.settings.seed}/{self.num_updates}/{name}".encode())
            adamw_update(
                parameter.detach(),
                self.gradient(name),
                self.states[name],
                hyperparameters,
                gradient_scale=scale,
                seed=seed,
            )
        self.zero_gradients()

    def zero_gradients(self) -> None:
        """Forget every accumulated gradient."""
        for name, parameter in self.parameters.items():
            if name in self._gradients:
                self._gradients[name].zero_()
            else:
                parameter.grad = None

    def master(self, name: str) -> torch.Tensor:
        """The fp32 weight of a parameter; a copy unless it is kept as such."""
        return master_weight(self.parameters[name], self.states[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything a checkpoint must hold, as ``KIND.NAME``.

        Kinds: ``weights`` (the fp32 master, or the bf16 parameter where there is none), and of
        :class:`~moescale.kernels.adamw.AdamWState` those there are: remainder, moments and their scales.
        """
        tensors = {}
        for name, parameter in self.parameters.items():
            state = self.states[name]
            tensors[f"weights.{name}"] = parameter.detach() if state.master is None else state.master
            for kind, tensor in state.tensors().items():
                if kind != "master":
                    tensors[f"{kind}.{name}"] = tensor
        return tensors

    def finish_load(self, num_updates: int) -> None:
        """Called after :meth:`tensors` were overwritten: set the update count, refresh the parameters."""
        if num_updates < 0:
            raise CheckpointError(f"optimizer update count ({num_updates}) must not be negative")
        self.num_updates = num_updates
        for name, parameter in self.parameters.items():
            state = self.states[name]
            if state.master is not None:
                set_master_weight(parameter.detach(), state, state.master)
