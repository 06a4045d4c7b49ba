"""Training with products in fp8: which modules, their copies through updates and resumption, and what they compute."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moescale.errors import ConfigError
from moescale.kernels.fp8 import copies_of, objection_to_fp8, reference
from moescale.kernels.fp8.errors import collecting, note
from moescale.kernels.fp8.scaled import E4M3, Scaled
from moescale.kernels.swiglu import swiglu
from moescale.models.blocks.linear import Linear
from moescale.models.blocks.moe import GatedMLP, RoutedExperts
from moescale.models.blocks.norm import Activation, RMSNorm
from moescale.models.fp8_gemms import use_fp8, write_weight_copies
from moescale.models.transformer import Transformer, build_on_meta, initialize
from moescale.plan import no_experts_in_fp8, one_device_plan
from moescale.runtime.optimizer import OptimizerFormat
from moescale.runtime.resume_checks import changes_since
from moescale.runtime.settings import TrainSettings
from tests.models.test_frozen_fp8 import FAMILIES
from tests.parity.test_parity import batch_of
from tests.runtime.test_train import trainer, weights
from tiny import tiny_config

PLAIN = {name: config for name, config in FAMILIES.items() if config.swiglu_clamp is None}
INNER_NORMS = ("attention.q_norm", "attention.kv_norm")
WIDE = dict(hidden_size=64, expert_intermediate_size=48)
ROWS_OF_EXPERTS = ("input", "gradient_of_the_result", "gradient_of_the_pre-activation", "weighted_activation")
FORMAT = OptimizerFormat(moments="bf16", master="bf16_remainder")


def model_of(config, *, experts: bool = False, dense: bool = False) -> Transformer:
    model = build_on_meta(config, torch.bfloat16).to_empty(device="cpu")
    initialize(model, seed=3)
    use_fp8(model, experts=experts, dense=dense)
    write_weight_copies(model)
    return model


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    tokens, targets = batch_of(model.config)
    output = model(tokens, targets=targets)
    output.loss_sum.backward()
    found = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    return found | {"loss": output.loss_sum.detach().double()}


def copied(model: Transformer) -> list[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
    found = [(module.weight, module.copies) for module in model.modules() if isinstance(module, Linear)]
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            found += [(module.gate_up, module.gate_up_copies), (module.down, module.down_copies)]
    return [(weight, copies) for weight, copies in found if copies is not None]


@pytest.mark.parametrize(
    ("family", "experts", "dense"),
    [(family, True, True) for family in sorted(PLAIN)] + [("tiny", True, False), ("tiny", False, True)],
)
def test_loss_and_gradients_differ_from_bf16_by_the_rounding_of_fp8(family, experts, dense):
    config = PLAIN[family]
    experts = experts and no_experts_in_fp8(config) is None  # of other widths they are refused, which is tested below
    plain, fp8 = (gradients(model_of(config, experts=e, dense=d)) for e, d in ((False, False), (experts, dense)))
    assert abs(fp8["loss"] / plain["loss"] - 1) < 0.02
    norm = torch.stack([gradient.norm() for gradient in plain.values()]).norm()
    off = torch.stack([(fp8[name] - plain[name]).norm() for name in plain]).norm() / norm
    assert 0 < off < 0.15, "nothing was quantised, or far too coarsely"


def without_quantising_norms(model: Transformer) -> Transformer:
    """Have every layer quantise its input itself."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.quantizes = False
    return model


def by_layers(mlp: GatedMLP, x: Activation) -> torch.Tensor:
    """The MLP of linear layers that quantise what they read themselves."""
    return mlp.down(swiglu(mlp.gate_up(x)))


def quantising_norms(model: Transformer) -> set[str]:
    """Names within the second block."""
    named = model.layers[1].named_modules()
    return {name for name, module in named if isinstance(module, RMSNorm) and module.quantizes}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_mlp_is_to_the_bit_what_its_layers_are(family, monkeypatch):
    config = dataclasses.replace(FAMILIES[family], dense_intermediate_size=80)
    experts = no_experts_in_fp8(config) is None
    found = gradients(model_of(config, experts=experts, dense=True))
    monkeypatch.setattr(GatedMLP, "forward", by_layers)
    expected = gradients(model_of(config, experts=experts, dense=True))
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())


def test_an_mlp_with_one_layer_in_fp8_runs_layer_by_layer():
    mlp = GatedMLP(32, 24).bfloat16()  # of down 24 columns
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    mlp.gate_up.copies = copies_of(mlp.gate_up.weight)
    assert torch.equal(mlp(x), by_layers(mlp, x))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_norms_quantise_once_what_layers_would_to_the_bit(family):
    config = FAMILIES[family]
    experts = no_experts_in_fp8(config) is None
    model = model_of(config, experts=experts, dense=True)
    wide = family != "compressed query, biases"  # of 24, and kv_down has 24 rows as well
    assert ("attention_norm" in quantising_norms(model)) == wide
    assert ("attention.kv_norm" in quantising_norms(model)) == hasattr(config, "kv_lora_rank")
    assert ("feed_forward_norm" in quantising_norms(model)) == (experts or config.num_shared_experts > 0)
    found = gradients(model)
    expected = gradients(without_quantising_norms(model_of(config, experts=experts, dense=True)))
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())


def test_a_tensor_that_several_layers_read_is_quantised_once(monkeypatch):
    config, calls, quantize = tiny_config(**WIDE, qk_rope_head_dim=16), [], reference.quantize_rows
    monkeypatch.setattr(reference, "quantize_rows", lambda x: calls.append(x.shape) or quantize(x))
    numbers = []
    for change in (lambda model: model, without_quantising_norms):
        model = change(model_of(config, experts=True, dense=True))
        calls.clear()
        model(batch_of(config)[0])
        numbers.append(len(calls))
    # Two projections of three layers read the same, and experts and shared experts of two.
    assert numbers[1] - numbers[0] == 3 + 2


@pytest.mark.parametrize(
    ("experts", "dense", "changes", "norms"),
    [
        (False, False, {}, set()),
        (True, False, {}, {"feed_forward_norm"}),
        (False, True, {}, {"attention_norm", "attention.kv_norm", "feed_forward_norm"}),
        (False, True, {"num_shared_experts": 0}, {"attention_norm", "attention.kv_norm"}),
        (False, True, {"hidden_size": 72}, {"attention.kv_norm"}),
        (True, True, {"q_lora_rank": 32}, {"attention_norm", *INNER_NORMS, "feed_forward_norm"}),
        (True, True, {"q_lora_rank": 24}, {"attention.kv_norm", "feed_forward_norm"}),  # kv_down has 24 rows, too
    ],
)
def test_norms_quantise_only_where_a_layer_reads_that(experts, dense, changes, norms):
    model = model_of(tiny_config(**(WIDE | changes)), experts=experts, dense=dense)
    assert quantising_norms(model) == norms


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_block_is_one_graph_and_the_same_to_the_bit():
    config = tiny_config(**WIDE)
    eager, compiled = (model_of(config, experts=True, dense=True) for _ in range(2))
    for block in compiled.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    expected = gradients(eager)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(compiled).items())


def test_everything_but_experts_and_linear_layers_of_blocks_stays_as_it_is():
    model = model_of(tiny_config(**WIDE), experts=True, dense=True)
    found = {id(weight) for weight, _ in copied(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in found}
    assert {name.split(".", 2)[2] for name in names} >= {
        "feed_forward.experts.gate_up",
        "feed_forward.experts.down",
        "feed_forward.shared_experts.gate_up.weight",
        "attention.output.weight",
        "feed_forward.down.weight",
    }
    assert not any("router" in name or "norm" in name or name.startswith(("embedding", "output")) for name in names)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (FAMILIES["tiny-gpt-oss"], "biases or a clamped activation"),
        (
            tiny_config(hidden_size=64, expert_intermediate_size=24),
            r"model.expert_intermediate_size \(24\) is no multiple of 16",
        ),
    ],
)
def test_experts_that_cannot_are_refused(config, words):
    with pytest.raises(ConfigError, match=words):
        model_of(config, experts=True)


def training(folder, **settings):
    return trainer(
        folder,
        config=tiny_config(**WIDE),
        dtype=torch.bfloat16,
        format=FORMAT,
        prepare=lambda model: use_fp8(model, experts=True, dense=True),
        **settings,
    )


def test_the_loss_falls_and_copies_follow_the_weights(tmp_path):
    one = training(tmp_path, total_steps=24)
    before = [copies.rows.float().clone() for _, copies in copied(one.model)]
    one.train()
    assert sum(one.observer.losses[-3:]) / 3 < one.observer.losses[0] - 0.3
    for (weight, copies), old in zip(copied(one.model), before, strict=True):
        fresh = copies_of(weight)
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(copies, fresh, strict=True))
        assert not torch.equal(copies.rows.float(), old), "the weight never changed: nothing was tested"


@pytest.mark.parametrize("recomputed", ["none", "block", "experts"])
def test_steps_and_errors_are_those_of_layers_that_quantise_themselves(tmp_path, recomputed, monkeypatch):
    runs = []
    for name in ("here", "there"):
        one = training(tmp_path / name, total_steps=5, fp8_errors_every=2)
        if name == "there":
            without_quantising_norms(one.model)
            monkeypatch.setattr(GatedMLP, "forward", by_layers)
        if recomputed == "block":
            one.model.recompute_layers = frozenset(range(3))
        for module in one.model.modules():
            if isinstance(module, RoutedExperts):
                module.recompute_up = recomputed == "experts"
        extra = []
        one.observer.after_step = lambda metrics, extra=extra: extra.append(dict(metrics.extra))
        one.train()
        runs.append((one.observer.losses, extra, weights(one)))
    (losses, errors, found), (expected_losses, expected_errors, expected) = runs
    assert losses == expected_losses and errors == expected_errors
    assert errors[0]["fp8_relative/linear_input"] > 0
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path):
    straight = training(tmp_path, total_steps=8, checkpoint_every=4)
    straight.train()
    second = training(tmp_path, total_steps=8)
    second.resume(second.store.at(4))
    second.train()
    assert second.observer.losses == straight.observer.losses[4:]
    other = weights(second)
    assert all(torch.equal(tensor, other[name]) for name, tensor in weights(straight).items())


def test_errors_are_in_the_metrics_and_measuring_changes_nothing(tmp_path):
    one = training(tmp_path / "measured", total_steps=4, fp8_errors_every=2)
    found = []
    one.observer.after_step = lambda metrics: found.append(dict(metrics.extra))
    one.train()
    plain = training(tmp_path / "plain", total_steps=4, fp8_errors_every=0)
    plain.train()
    assert one.observer.losses == plain.observer.losses
    assert [bool(extra) for extra in found] == [True, True, False, True]
    tensors = {name.partition("/")[2] for name in found[0]}
    assert tensors == {
        "linear_input",
        "linear_gradient_of_the_result",
        "linear_weight",
        "experts_weight",
        "experts_activation",
        *(f"experts_{name}{part}" for name in ROWS_OF_EXPERTS for part in ("", "_transposed")),
    }
    for extra in found[:2]:
        for name in tensors:
            assert 0.015 < extra[f"fp8_relative/{name}"] < 0.045, "numbers of 3 explicit bits are off by 2 to 3%"
            assert extra[f"fp8_saturated/{name}"] == 0
            assert 0 <= extra[f"fp8_underflowed/{name}"] < 0.1


def test_what_saturates_and_what_becomes_zero_is_counted():
    exact = torch.tensor([[448.0, 1000.0, -464.0, 1e-4], [1.0, 0.0, 0.0, 2.0**-9]])
    scaled = Scaled(exact.clamp(-448, 448).to(E4M3), torch.ones(2))
    with collecting() as collector:
        note("rows", lambda: exact, scaled)
    errors = collector.errors()["rows"]
    assert errors.saturated == 2 / 8 and errors.underflowed == 1 / 8
    off = torch.tensor([552.0, 16.0, 1e-4]).double().norm() / exact.double().norm()
    assert errors.relative == pytest.approx(off.item(), rel=1e-6)


def test_resuming_in_another_precision_is_said():
    stored = {"settings": {}, "plan": {"expert_gemms": "fp8", "dense_gemms": "compute"}, "total_steps": 8}
    changes = changes_since(stored, TrainSettings(), {"expert_gemms": "compute", "dense_gemms": "compute"}, 8)
    assert changes == ["expert_gemms fp8 -> compute"]


def test_a_gpu_before_hopper_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "capability (9, 0); cuda:0 has (8, 0)" in (objection_to_fp8(torch.device("cuda:0")) or "")
    monkeypatch.setattr("moescale.models.fp8_gemms.objection_to_fp8", lambda device: "needs another GPU; take one")
    with pytest.raises(ConfigError, match=r"plan.dense_gemms \(fp8\) needs another GPU; take one"):
        model_of(tiny_config(**WIDE), dense=True)


def test_a_plan_for_a_model_whose_experts_cannot_is_refused_before_anything_is_built():
    config = FAMILIES["tiny-gpt-oss"]
    plan = one_device_plan(
        config, sequence_length=8, micro_batch_sequences=1, gradient_accumulation_steps=1, compute_dtype="bf16"
    )
    plan.check_model(config)
    with pytest.raises(ConfigError, match=r"plan.expert_gemms \(fp8\) must be compute: this version has no experts"):
        dataclasses.replace(plan, expert_gemms="fp8").check_model(config)
