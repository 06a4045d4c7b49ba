import gc
import weakref

import pytest
import torch

from moescale.errors import ConfigError
from moescale.runtime.layout import Part
from moescale.runtime.optimizer import AdamW, OptimizerFormat
from moescale.runtime.settings import TrainSettings


def parameters(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.nn.Parameter(torch.randn(6, 5, generator=generator).to(dtype)),
        "norm": torch.nn.Parameter(torch.randn(7, generator=generator).to(dtype)),
    }


def test_ten_updates_equal_torchs_adamw_with_clipping():
    settings = TrainSettings(learning_rate=0.01, weight_decay=0.3, gradient_clip=0.5)
    ours = parameters(torch.float32)
    theirs = parameters(torch.float32)
    optimizer = AdamW(ours.items(), settings)
    groups = [
        {"params": [theirs["matrix"]], "weight_decay": 0.3},
        {"params": [theirs["norm"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(settings.beta1, settings.beta2), eps=settings.eps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        for name in ours:
            gradient = torch.randn(ours[name].shape, generator=generator)
            ours[name].grad, theirs[name].grad = gradient.clone(), gradient.clone()
        optimizer.step(0.01, optimizer.gradient_norm())
        torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        reference.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


def test_bf16_gradients_are_summed_in_fp32():
    """1 + 256 * 2^-10 summed in bf16 stays 1: each addend is below half a unit in the last place."""
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = AdamW([("norm", parameter)], TrainSettings())
    for value in [1.0] + [2.0**-10] * 256:
        (parameter * value).sum().backward()
    assert parameter.grad is None
    assert optimizer.gradient("norm").tolist() == [1.25] * 3


def test_updates_smaller_than_a_bf16_step_are_not_lost():
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = AdamW([("norm", parameter)], TrainSettings())
    for _ in range(100):
        (parameter * 1.0).sum().backward()
        optimizer.step(1e-4, optimizer.gradient_norm())
    assert optimizer.master("norm").tolist() == pytest.approx([0.99, 0.99], abs=1e-5)
    assert parameter.tolist() == [0.98828125, 0.98828125]


def test_a_parameter_that_no_gradient_reached_counts_as_zero():
    named = parameters(torch.float32)
    optimizer = AdamW(named.items(), TrainSettings(weight_decay=0.0))
    named["matrix"].grad = torch.ones_like(named["matrix"])
    before = named["norm"].detach().clone()
    assert optimizer.gradient_norm().item() == pytest.approx(30**0.5)
    optimizer.step(0.1, optimizer.gradient_norm())
    assert torch.equal(named["norm"], before)


def test_states_that_the_host_has_no_room_for_are_refused_before_any_is_made(monkeypatch):
    monkeypatch.setattr("moescale.runtime.optimizer.available_host_bytes", lambda: 300.0)
    offloaded = OptimizerFormat(offload=True)
    with pytest.raises(ConfigError, match=r"plan.offload_optimizer: .*ranks on this host: 1.*--forbid"):
        AdamW(parameters(torch.bfloat16).items(), TrainSettings(), offloaded)
    monkeypatch.setattr("moescale.runtime.optimizer.available_host_bytes", lambda: 37 * 12.0)  # 37 weights
    AdamW(parameters(torch.bfloat16).items(), TrainSettings(), offloaded)


@pytest.mark.parametrize("cut", [(slice(0, 3), slice(0, 5)), (slice(3, 6), slice(0, 5))])
def test_a_part_is_rounded_as_it_is_in_the_whole(cut):
    """Stochastic rounding draws by the index in the whole tensor, whoever holds the element."""
    settings, format = TrainSettings(), OptimizerFormat(master="stochastic_bf16")
    whole_tensor = parameters(torch.bfloat16)["matrix"]
    gradient = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    part = torch.nn.Parameter(whole_tensor.detach()[cut].clone())
    places = {"matrix": Part(shape=(6, 5), index=cut)}
    for parameter, grad, parts in ((whole_tensor, gradient, None), (part, gradient[cut], places)):
        optimizer = AdamW([("matrix", parameter)], settings, format, parts=parts)
        optimizer.gradient("matrix").copy_(grad)
        optimizer.step(1e-3, torch.ones(()))
    assert torch.equal(part, whole_tensor[cut])


def test_optimizer_parameters_and_states_are_freed_with_the_last_reference():
    named = parameters(torch.bfloat16)
    optimizer = AdamW(named.items(), TrainSettings())
    (named["matrix"] * 2.0).sum().backward()
    optimizer.step(0.01, optimizer.gradient_norm())
    kept = [weakref.ref(optimizer), *map(weakref.ref, named.values()), weakref.ref(optimizer.gradient("matrix"))]
    named.clear()
    del optimizer
    gc.collect()
    assert [reference() for reference in kept] == [None] * len(kept)
