"""Adapters of a model: which modules get one, what stays frozen, and losses and gradients against PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from moescale.convert.hf_config import read_model_config, resolve_model
from moescale.errors import ConfigError
from moescale.lora import LoraSettings, parse_lora
from moescale.models.lora import ExpertsAdapter, LinearAdapter, adapters_of, add_adapters, is_adapter
from moescale.models.transformer import Transformer, build_on_meta, initialize
from moescale.planner.workload import build_workload
from moescale.runtime.optimizer import AdamW
from moescale.runtime.settings import TrainSettings
from tests.parity.test_parity import batch_of, error, export, load
from tiny import randomize_adapters, tiny_config

LORA = LoraSettings(rank=4, alpha=6)


def adapted_model(lora: LoraSettings = LORA, dtype: torch.dtype = torch.float32, **overrides: Any) -> Transformer:
    """With adapters of which no factor is zero."""
    model = build_on_meta(tiny_config(**({"initializer_std": 0.2} | overrides)), dtype)
    add_adapters(model, lora)
    initialize(model.to_empty(device="cpu"), seed=3)
    randomize_adapters(model)
    return model


def with_peft(model: Transformer, lora: LoraSettings, folder: Path) -> torch.nn.Module:
    """The same frozen weights in transformers, with the same adapters put in place by PEFT's own definition."""
    frozen = {name: weight for name, weight in model.named_parameters() if not is_adapter(name)}
    bare = build_on_meta(model.config, torch.float32).to_empty(device="cpu")
    bare.load_state_dict(frozen)
    hf = load(export(model.config, bare, folder), torch.float32)
    modules = [*("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]
    # Named as modules, PEFT takes these for routed experts (huggingface/peft#3711); as parameters it leaves them alone.
    parameters = {
        "dense": [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")],
        "shared": [f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")],
        "experts": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    groups = ("attention", *parameters) if lora.targets == ("all",) else lora.targets
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.rank_stabilised,
        target_modules=modules if "attention" in groups else [],
        target_parameters=[word for group in groups for word in parameters.get(group, ())],
    )
    wrapped = peft.get_peft_model(hf, config)
    wrapped.load_state_dict({name: value for name, value in peft_state(model)}, strict=False)
    missing = {name for name, _ in wrapped.named_parameters() if "lora_" in name} - dict(peft_state(model)).keys()
    assert not missing
    return wrapped


HF_MODULES = {
    "attention.q_proj": ("self_attn.q_proj",),
    "attention.q_down": ("self_attn.q_a_proj",),
    "attention.q_up": ("self_attn.q_b_proj",),
    "attention.kv_down": ("self_attn.kv_a_proj_with_mqa",),
    "attention.kv_up": ("self_attn.kv_b_proj",),
    "attention.output": ("self_attn.o_proj",),
    "feed_forward.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "feed_forward.down": ("mlp.down_proj",),
    "feed_forward.shared_experts.gate_up": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "feed_forward.shared_experts.down": ("mlp.shared_experts.down_proj",),
}


def peft_state(model: Transformer, *, gradients: bool = False) -> list[tuple[str, torch.Tensor]]:
    """Factors, or their gradients, under the names that PEFT gives them in memory: written out here by its rules."""
    found = []

    def value(parameter: torch.Tensor) -> torch.Tensor:
        return (parameter.grad if gradients else parameter).detach().clone()

    for name, adapter in adapters_of(model).items():
        _, layer, path = name.split(".", 2)
        prefix = f"base_model.model.model.layers.{layer}."
        if isinstance(adapter, ExpertsAdapter):
            for module, a, b in (
                ("mlp.experts.base_layer", adapter.gate_up_a, adapter.gate_up_b),
                ("mlp.experts", adapter.down_a, adapter.down_b),
            ):
                found.append((f"{prefix}{module}.lora_A.default.weight", value(a).flatten(0, 1)))
                found.append((f"{prefix}{module}.lora_B.default.weight", value(b).permute(1, 2, 0).flatten(1)))
            continue
        modules = HF_MODULES[path]
        parts = (value(factor).chunk(len(modules)) for factor in (adapter.a, adapter.b))
        for module, a, b in zip(modules, *parts, strict=True):
            found.append((f"{prefix}{module}.lora_A.default.weight", a))
            found.append((f"{prefix}{module}.lora_B.default.weight", b))
    return found


CASES: dict[str, tuple[LoraSettings, dict[str, Any]]] = {
    "all": (LORA, {}),
    "attention": (LoraSettings(rank=4, alpha=6, targets=("attention",)), {}),
    "attention_query_rank_and_bias": (
        LoraSettings(rank=4, alpha=6, targets=("attention",)),
        dict(q_lora_rank=24, attention_bias=True),
    ),
    "dense": (LoraSettings(rank=4, alpha=6, targets=("dense",)), {}),
    "shared": (LoraSettings(rank=4, alpha=6, targets=("shared",)), dict(num_shared_experts=2)),
    "experts": (LoraSettings(rank=4, alpha=6, targets=("experts",)), {}),
    "rank_stabilised": (LoraSettings(rank=4, alpha=6, rank_stabilised=True), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_every_gradient_are_pefts(name: str, tmp_path: Path) -> None:
    lora, overrides = CASES[name]
    model = adapted_model(lora, **overrides)
    tokens, targets = batch_of(model.config)
    wanted = with_peft(model, lora, tmp_path)
    theirs = wanted(tokens, labels=tokens)
    theirs.loss.backward()
    with torch.no_grad():
        assert error(model(tokens).logits, theirs.logits) < 1e-5
    loss = model(tokens, targets=targets).loss_sum / (targets >= 0).sum()
    loss.backward()
    assert error(loss, theirs.loss) < 1e-5
    found = dict(peft_state(model, gradients=True))
    trained = {name: weight for name, weight in wanted.named_parameters() if weight.requires_grad}
    assert found.keys() == trained.keys()
    for key, gradient in found.items():
        assert error(gradient, trained[key].grad) < 1e-5, key


def test_dropout_acts_on_the_input_of_a_in_training_alone() -> None:
    lora = LoraSettings(rank=4, alpha=6, targets=("attention.q_proj",), dropout=0.4)
    model = adapted_model(lora)
    linear = model.layers[0].attention.q_proj
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    a, b = linear.adapter.a, linear.adapter.b
    plain = x @ linear.weight.T
    torch.manual_seed(1)
    got = linear(x)
    torch.manual_seed(1)
    dropped = torch.nn.functional.dropout(x, 0.4)
    torch.testing.assert_close(got, plain + 1.5 * dropped @ a.T @ b.T)
    grads = torch.autograd.grad(got.square().sum(), [a, b])
    wanted = torch.autograd.grad((plain + 1.5 * dropped @ a.T @ b.T).square().sum(), [a, b])
    assert all(error(*pair) < 1e-5 for pair in zip(grads, wanted, strict=True))
    model.eval()
    torch.testing.assert_close(linear(x), plain + 1.5 * x @ a.T @ b.T)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_layers_give_the_buffers_the_same_gradients() -> None:
    """Of every adapter, also where nothing before it is trained; in one graph for each kind of layer."""

    def gradients(compiled: bool) -> dict[str, torch.Tensor]:
        model = adapted_model(LORA, torch.bfloat16)
        optimizer = AdamW(model.named_parameters(), TrainSettings())
        optimizer.accumulate_in_gemms(model)
        if compiled:
            torch.compiler.reset()
            for block in model.layers:
                block.compile(fullgraph=True, backend="aot_eager")
        tokens, targets = batch_of(model.config)
        for _ in range(2):
            model(tokens, targets=targets).loss_sum.backward()
        return {name: optimizer.gradient(name) for name in optimizer.parameters}

    alone, compiled = gradients(False), gradients(True)
    for name, gradient in alone.items():
        assert gradient.any() and error(compiled[name], gradient) < 2e-2, name


def test_only_adapters_are_trained_and_the_weights_are_drawn_as_without() -> None:
    config = tiny_config()
    bare = build_on_meta(config, torch.bfloat16).to_empty(device="cpu")
    initialize(bare, seed=7)
    model = build_on_meta(config, torch.bfloat16)
    add_adapters(model, LORA)
    initialize(model.to_empty(device="cpu"), seed=7)
    for name, weight in bare.named_parameters():
        assert torch.equal(model.get_parameter(name), weight), name
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == is_adapter(name), name
        assert parameter.dtype == (torch.float32 if is_adapter(name) else torch.bfloat16), name
        if is_adapter(name) and name.endswith("b"):
            assert not parameter.any(), name
        elif is_adapter(name):
            bound = parameter.shape[-1] ** -0.5
            assert 0.5 * bound < parameter.abs().max() <= bound, name
    tokens, _ = batch_of(config)
    assert torch.equal(model(tokens).logits, bare(tokens).logits)


def test_targets_choose_modules_by_group_and_by_the_end_of_their_path() -> None:
    def adapted(targets: str) -> set[str]:
        return {name.split(".", 2)[2] for name in adapters_of(adapted_model(parse_lora(f"rank=2,targets={targets}")))}

    attention = {f"attention.{name}" for name in ("q_proj", "kv_down", "kv_up", "output")}
    assert adapted("attention") == attention
    assert adapted("q_proj+attention.output") == {"attention.q_proj", "attention.output"}
    assert adapted("down") == {"feed_forward.down", "feed_forward.shared_experts.down"}
    assert adapted("experts") == {"feed_forward.experts"}
    assert adapted("all") == attention | {
        *("feed_forward.gate_up", "feed_forward.down", "feed_forward.experts"),
        *("feed_forward.shared_experts.gate_up", "feed_forward.shared_experts.down"),
    }
    kinds = {type(adapter) for adapter in adapters_of(adapted_model()).values()}
    assert kinds == {LinearAdapter, ExpertsAdapter}


@pytest.mark.parametrize(
    "text, message",
    [
        ("rank=0", r"lora\.rank \(0\) must be at least 1"),
        ("rank=two", r"lora\.rank \('two'\) must be a whole number"),
        ("alpha=4", r"lacks a rank"),
        ("rank=2,alpha=inf", r"lora\.alpha \(inf\) must be at least 1e-06 and at most 1e\+06"),
        ("rank=2,rank=4", r"lora\.rank is given twice \(2, 4\)"),
        ("rank=2,base=", r"\('base='\) must be name=value.*rank_stabilised, base$"),
        ("rank=2,drop=0.1", r"'drop=0\.1'\) must be name=value.*did you mean 'dropout'"),
        ("rank=2,dropout=1", r"lora\.dropout \(1\.0\) must be at least 0 and below 1"),
        ("rank=2,rank_stabilised=yes", r"lora\.rank_stabilised \('yes'\) must be true or false"),
        ("rank=2,base=bf16", r"lora\.base \('bf16'\) must be compute, the compute dtype of the plan, or fp8"),
        ("rank=2,targets=atention", r"lora\.targets \('atention'\) must be one of all, .*did you mean 'attention'"),
        ("rank=2,targets=router", r"router, norms, embedding and output stay frozen"),
        (
            "rank=2,dropout=0.1",
            r"lora\.dropout \(0\.1\) must be 0 where routed experts are among lora\.targets \(all\)",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_value(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        add_adapters(build_on_meta(tiny_config(), torch.float32), parse_lora(text))


def test_a_model_without_dense_layers_has_no_such_target() -> None:
    model = build_on_meta(tiny_config(first_moe_layer=0), torch.float32)
    with pytest.raises(ConfigError, match=r"'dense'\) must be one of all, attention, shared, experts"):
        add_adapters(model, parse_lora("rank=2,targets=dense"))


def test_experts_with_biases_are_refused_and_attention_around_them_is_adapted() -> None:
    config = read_model_config(resolve_model("tiny-gpt-oss"))
    for targets in ("all", "experts"):
        for refuse in (
            lambda lora: add_adapters(build_on_meta(config, torch.float32), lora),
            lambda lora: build_workload(config, lora=lora),
        ):
            with pytest.raises(ConfigError, match=rf"lora\.targets \({targets}\) must leave out the routed experts"):
                refuse(parse_lora(f"rank=4,targets={targets}"))
    lora = parse_lora("rank=4,targets=attention")
    model = build_on_meta(config, torch.float32)
    add_adapters(model, lora)
    initialize(model.to_empty(device="cpu"), seed=1)
    tokens, targets = batch_of(config)
    model(tokens, targets=targets).loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == is_adapter(name), name
    assert build_workload(config, lora=lora).trained.others == sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )


def test_settings_are_read_back_from_their_text() -> None:
    for text in (
        *("rank=16", "rank=8,alpha=4,targets=attention+experts", "rank=4,targets=dense,dropout=0.25"),
        "rank=4,rank_stabilised=true,base=fp8",
    ):
        lora = parse_lora(text)
        assert parse_lora(lora.text()) == lora
    assert parse_lora("rank=16").alpha == 32
    assert parse_lora("rank=16,rank_stabilised=true").scale == 8
