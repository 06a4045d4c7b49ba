"""AdamW over fp32 master weights, with gradients accumulated in fp32.

Parameters are kept in the compute dtype. A bf16 parameter has an fp32 master weight beside it, and its gradient of each
micro-batch is added to an fp32 buffer as soon as autograd has produced it, so that no sum is ever rounded to bf16. For
fp32 parameters parameter and master are one tensor, and autograd accumulates in place.

Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from moescale.errors import CheckpointError
from moescale.runtime.settings import TrainSettings


class AdamW:
    """Optimizer state and update of a set of named parameters."""

    def __init__(self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], settings: TrainSettings) -> None:
        self.settings = settings
        self.parameters = dict(named_parameters)
        self.masters: dict[str, torch.Tensor] = {}
        self.first_moments: dict[str, torch.Tensor] = {}
        self.second_moments: dict[str, torch.Tensor] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        self.num_updates = 0
        for name, parameter in self.parameters.items():
            data = parameter.detach()
            self.masters[name] = data if data.dtype == torch.float32 else data.float()
            self.first_moments[name] = torch.zeros_like(self.masters[name])
            self.second_moments[name] = torch.zeros_like(self.masters[name])
            if data.dtype != torch.float32:
                self._accumulate_in_fp32(name, parameter)

    def _accumulate_in_fp32(self, name: str, parameter: torch.nn.Parameter) -> None:
        self._gradients[name] = torch.zeros_like(self.masters[name])

        def add_to_buffer(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            self._gradients[name].add_(parameter.grad)
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(add_to_buffer)

    def gradient(self, name: str) -> torch.Tensor:
        """The fp32 gradient accumulated so far, with the parameter's shape; zeros where nothing has reached it."""
        if name in self._gradients:
            return self._gradients[name]
        parameter = self.parameters[name]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def gradient_norm(self) -> torch.Tensor:
        """L2 norm over all gradients: fp32 scalar on their device."""
        norms = torch._foreach_norm([self.gradient(name) for name in self.parameters])
        return torch.linalg.vector_norm(torch.stack(list(norms)))

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_norm: torch.Tensor) -> None:
        """Clip to ``settings.gradient_clip`` given the norm, update masters and parameters, and clear the gradients."""
        gradients = [self.gradient(name) for name in self.parameters]
        if self.settings.gradient_clip:
            coefficient = (self.settings.gradient_clip / (gradient_norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, coefficient)
        self.num_updates += 1
        for decayed in (True, False):
            names = [name for name, master in self.masters.items() if (master.dim() > 1) == decayed]
            if names:
                self._update(names, learning_rate, self.settings.weight_decay if decayed else 0.0)
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                parameter.copy_(self.masters[name])
        self.zero_gradients()

    def _update(self, names: list[str], learning_rate: float, weight_decay: float) -> None:
        masters = [self.masters[name] for name in names]
        # The operator wants one step count per tensor; it reads them after adding nothing to them.
        steps = [torch.full((), float(self.num_updates), device=master.device) for master in masters]
        torch._fused_adamw_(
            masters,
            [self.gradient(name) for name in names],
            [self.first_moments[name] for name in names],
            [self.second_moments[name] for name in names],
            [],
            steps,
            lr=learning_rate,
            beta1=self.settings.beta1,
            beta2=self.settings.beta2,
            weight_decay=weight_decay,
            eps=self.settings.eps,
            amsgrad=False,
            maximize=False,
        )

    def zero_gradients(self) -> None:
        """Forget every accumulated gradient."""
        for name, parameter in self.parameters.items():
            if name in self._gradients:
                self._gradients[name].zero_()
            else:
                parameter.grad = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything a checkpoint must hold: ``weights.NAME`` (fp32), ``first_moment.NAME``, ``second_moment.NAME``."""
        groups = (
            ("weights", self.masters),
            ("first_moment", self.first_moments),
            ("second_moment", self.second_moments),
        )
        return {f"{group}.{name}": tensor for group, tensors in groups for name, tensor in tensors.items()}

    @torch.no_grad()
    def finish_load(self, num_updates: int) -> None:
        """Called after :meth:`tensors` were overwritten: set the update count, refresh the parameters."""
        if num_updates < 0:
            raise CheckpointError(f"optimizer update count ({num_updates}) must not be negative")
        self.num_updates = num_updates
        for name, parameter in self.parameters.items():
            parameter.copy_(self.masters[name])
