"""How the kernels are judged: against the plain-torch reference in fp32, allowed twice plain torch's own error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Operator = Callable[..., tuple[torch.Tensor, ...]]
"""Takes tensors and ``backend=``; returns its floating-point results, the ones to differentiate."""


def outputs_and_gradients(operator: Operator, inputs: Sequence[torch.Tensor], backend: str) -> list[torch.Tensor]:
    """Results of ``operator`` and the gradients of a fixed random projection of them, for inputs that want one."""
    results = operator(*inputs, backend=backend)
    generator = torch.Generator().manual_seed(7)
    loss = torch.zeros((), device=DEVICE)
    for result in results:
        direction = torch.randn(result.shape, generator=generator).to(result.device, result.dtype)
        loss = loss + (result.float() * direction.float()).sum()
    wanted = [x for x in inputs if x.requires_grad]
    return [*(r.detach() for r in results), *torch.autograd.grad(loss, wanted)]


def assert_accurate(operator: Operator, inputs: Sequence[torch.Tensor]) -> None:
    """Triton's error in the inputs' dtype is at most twice plain torch's, both against plain torch in fp32."""
    ours = outputs_and_gradients(operator, inputs, "triton")
    plain = outputs_and_gradients(operator, inputs, "torch")
    # Tables and logits that are fp32 by definition stay so: only what the caller's dtype decides is widened.
    exact = outputs_and_gradients(operator, [_widened(x) for x in inputs], "torch")
    low_precision = any(x.dtype in (torch.bfloat16, torch.float16) for x in inputs)
    for position, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, position
        if not a.numel():
            continue
        assert a.isfinite().all(), f"result {position} has elements that were not written, or are not finite"
        scale = c.float().norm() + 1e-30
        error, plain_error = ((x.float() - c.float()).norm() / scale for x in (a, b))
        floor = 1e-6 if low_precision else 2e-6
        assert error <= 2 * plain_error + floor, f"result {position}: error {error:.2e}, plain torch {plain_error:.2e}"


def _widened(x: torch.Tensor) -> torch.Tensor:
    if not x.is_floating_point() or x.dtype == torch.float32:
        return x
    return x.detach().float().requires_grad_(x.requires_grad)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, grad: bool = True) -> torch.Tensor:
    """Standard normal numbers on the test device, the same whatever the device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_(grad)
