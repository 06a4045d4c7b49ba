"""Adapters in and out: what every export adds to every expert, against our own, and opened by PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import CASES, LORA, adapted_model
from test_parity import batch_of, error, export, load

from moescale.convert.adapter_folder import export_adapter, read_adapter, read_adapter_settings
from moescale.convert.checkpoint_export import export_checkpoint
from moescale.convert.folder_weights import FolderWeights
from moescale.convert.key_table import build_key_table
from moescale.convert.merged_weights import MergedWeights
from moescale.convert.tensor_source import ModelWeights
from moescale.errors import CheckpointError
from moescale.lora import LoraSettings
from moescale.models.lora import ExpertsAdapter, adapters_of, is_adapter
from moescale.models.transformer import Transformer, build_on_meta, named_weights


def base_folder(model: Transformer, folder: Path) -> Path:
    """The frozen weights as a Hugging Face folder."""
    bare = build_on_meta(model.config, torch.float32).to_empty(device="cpu")
    bare.load_state_dict(named_weights(model))
    return export(model.config, bare, folder)


def adapters(model: Transformer) -> ModelWeights:
    return ModelWeights({name: p for name, p in model.named_parameters() if is_adapter(name)})


def own_deltas(model: Transformer, lora: LoraSettings) -> dict[str, torch.Tensor]:
    """What our forward adds to each weight, found by running it: by key of a published folder.

    A linear layer is run on unit vectors with its weight zeroed, an expert's sum is made by its definition.
    """
    found: dict[str, torch.Tensor] = {}
    for name, adapter in adapters_of(model).items():
        if isinstance(adapter, ExpertsAdapter):
            wholes = {
                f"{name}.gate_up": torch.stack([b @ a for a, b in zip(adapter.gate_up_a, adapter.gate_up_b)]),  # noqa: B905
                f"{name}.down": torch.stack([b @ a for a, b in zip(adapter.down_a, adapter.down_b)]),  # noqa: B905
            }
            wholes = {key: lora.scale * delta for key, delta in wholes.items()}
        else:
            weight = model.get_parameter(f"{name}.weight")
            unit = torch.eye(weight.shape[1])
            wholes = {f"{name}.weight": adapter(unit, torch.zeros_like(weight), None, None).T}
        for key, delta in wholes.items():
            for piece in build_key_table(model.config)[key]:
                found[piece.key] = delta.detach()[piece.index].reshape(piece.shape)
    return found


def deltas_of_peft_layout(folder: Path, num_experts: int) -> dict[str, torch.Tensor]:
    """What a folder of PEFT's layout adds to each weight, by PEFT's own equations."""
    document = json.loads((folder / "adapter_config.json").read_text())
    scale = document["lora_alpha"] / (document["r"] ** (0.5 if document["use_rslora"] else 1))
    stored = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, a in stored.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b = stored[name.replace("lora_A", "lora_B")]
        if not module.endswith((".experts", ".experts.base_layer")):
            found[f"{module}.weight"] = scale * b @ a
            continue
        of_experts = torch.einsum(
            "ore,eri->eoi", b.reshape(b.shape[0], -1, num_experts), a.reshape(num_experts, -1, a.shape[-1])
        )
        for expert, delta in enumerate(scale * of_experts):
            prefix = f"{module.removesuffix('.base_layer')}.{expert}"
            if module.endswith("base_layer"):
                found[f"{prefix}.gate_proj.weight"], found[f"{prefix}.up_proj.weight"] = delta.chunk(2)
            else:
                found[f"{prefix}.down_proj.weight"] = delta
    return found


def assert_same_deltas(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for key, delta in wanted.items():
        assert delta.any() and error(found[key], delta) < tolerance, key


@pytest.mark.parametrize("name", CASES)
def test_the_peft_export_adds_to_every_weight_and_expert_what_ours_does(name: str, tmp_path: Path) -> None:
    lora, overrides = CASES[name]
    model = adapted_model(lora, **overrides)
    export_adapter(model.config, lora, adapters(model), tmp_path / "out", layout="peft", base_model="base")
    found = deltas_of_peft_layout(tmp_path / "out", model.config.num_experts)
    assert_same_deltas(found, own_deltas(model, lora), 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_per_expert_export_adds_to_every_weight_and_expert_what_ours_does(name: str, tmp_path: Path) -> None:
    lora, overrides = CASES[name]
    model = adapted_model(lora, **overrides)
    export_adapter(model.config, lora, adapters(model), tmp_path / "out", layout="per-expert", base_model="base")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    found = {}
    for key, a in stored.items():
        assert a.dim() == 2 and lora.rank in a.shape, key
        if "lora_A" in key:
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[f"{module}.weight"] = lora.scale * stored[key.replace("lora_A", "lora_B")] @ a
    assert_same_deltas(found, own_deltas(model, lora), 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_merged_export_has_ours_added_to_every_weight_and_equal_logits(name: str, tmp_path: Path) -> None:
    lora, overrides = CASES[name]
    model = adapted_model(lora, **overrides)
    base = base_folder(model, tmp_path)
    weights = MergedWeights(FolderWeights(base, model.config, torch.float32), adapters(model), model.config, lora)
    export_checkpoint(model.config, weights, tmp_path / "merged", reference=base, dtype=torch.float32)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    wanted = own_deltas(model, lora)
    for key, weight in before.items():
        if key in wanted:
            assert error(after[key] - weight, wanted[key]) < 1e-5, key
        else:
            assert torch.equal(after[key], weight), key
    tokens, _ = batch_of(model.config)
    with torch.no_grad():
        assert error(load(tmp_path / "merged", torch.float32)(tokens).logits, model(tokens).logits) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_peft_opens_the_export_and_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    lora, overrides = CASES[name]
    model = adapted_model(lora, **overrides)
    base = base_folder(model, tmp_path)
    export_adapter(model.config, lora, adapters(model), tmp_path / "out", layout="peft", base_model=str(base))
    opened = peft.PeftModel.from_pretrained(load(base, torch.float32), tmp_path / "out")
    tokens, _ = batch_of(model.config)
    with torch.no_grad():
        ours, theirs = model(tokens).logits, opened(tokens).logits
        assert error(ours, theirs) < 1e-5
        assert error(ours, load(base, torch.float32)(tokens).logits) > 1e-3, "the adapters do something"


@pytest.mark.parametrize("layout", ["peft", "per-expert"])
@pytest.mark.parametrize("name", CASES)
def test_an_export_is_read_back_exactly(name: str, layout: Any, tmp_path: Path) -> None:
    lora, overrides = CASES[name]
    model = adapted_model(lora, **overrides)
    export_adapter(model.config, lora, adapters(model), tmp_path / "out", layout=layout, base_model="base")
    read = read_adapter_settings(tmp_path / "out", model.config)
    assert (read.rank, read.scale) == (lora.rank, lora.scale)
    found = read_adapter(tmp_path / "out", model.config, read)
    wanted = {name: parameter for name, parameter in model.named_parameters() if is_adapter(name)}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], parameter) for key, parameter in wanted.items())


def change(folder: Path, **fields: Any) -> None:
    document = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(document | fields))


def test_what_cannot_be_continued_is_refused_by_name(tmp_path: Path) -> None:
    model = adapted_model()
    folder = tmp_path / "out"
    export_adapter(model.config, LORA, adapters(model), folder, layout="peft", base_model="base")
    with pytest.raises(CheckpointError, match="already exists"):
        export_adapter(model.config, LORA, adapters(model), folder, layout="peft", base_model="base")
    for field, value in (("use_dora", True), ("bias", "all"), ("rank_pattern", {"q_proj": 2}), ("peft_type", "IA3")):
        before = (folder / "adapter_config.json").read_text()
        change(folder, **{field: value})
        with pytest.raises(CheckpointError, match=rf"{field} \(.*\) must be"):
            read_adapter_settings(folder, model.config)
        (folder / "adapter_config.json").write_text(before)
    stored = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.experts.lora_A.weight"

    def read_with(changed: dict[str, torch.Tensor]) -> None:
        save_file({name: t.contiguous() for name, t in changed.items()}, folder / "adapter_model.safetensors")
        read_adapter(folder, model.config, LORA)

    with pytest.raises(CheckpointError, match=r"has shape .*; if PEFT before 0\.19\.1 wrote it"):
        read_with(stored | {key: stored[key].T})
    with pytest.raises(CheckpointError, match=f"lacks tensor '{key}'"):
        read_with({name: tensor for name, tensor in stored.items() if name != key})
    with pytest.raises(CheckpointError, match="belongs to no module among lora.targets"):
        read_with(stored | {"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match="not finite"):
        read_with(stored | {key: stored[key] * float("nan")})


def test_gate_and_up_of_an_expert_with_an_a_each_are_refused(tmp_path: Path) -> None:
    model = adapted_model()
    export_adapter(model.config, LORA, adapters(model), tmp_path / "out", layout="per-expert", base_model="base")
    path = tmp_path / "out" / "adapter_model.safetensors"
    stored = load_file(path)
    stored["base_model.model.model.layers.2.mlp.experts.3.up_proj.lora_A.weight"] += 1
    save_file(stored, path)
    with pytest.raises(CheckpointError, match="gate_proj and up_proj of 'model.layers.2.mlp.experts' have different"):
        read_adapter(tmp_path / "out", model.config, LORA)


def test_every_field_of_peft_is_read_or_harmless_or_refused_where_it_is_used(tmp_path: Path) -> None:
    model, folder = adapted_model(), tmp_path / "out"
    export_adapter(model.config, LORA, adapters(model), folder, layout="peft", base_model="base")
    before = json.loads((folder / "adapter_config.json").read_text())
    peft.LoraConfig(**{name: value for name, value in before.items() if name != "inference_mode"}).save_pretrained(
        folder
    )
    assert read_adapter_settings(folder, model.config).rank == LORA.rank, "as PEFT itself writes it, with every field"
    saved = json.loads((folder / "adapter_config.json").read_text())
    for field, value in (
        ("layer_replication", [[0, 2], [1, 3]]),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("lora_bias", True),
        ("trainable_token_indices", [3]),
        ("kasa_config", {"a": 1}),
        ("what_comes_next", 1),
        *(
            ("init_lora_weights", value)
            for value in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", 1, None, [])
        ),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(saved | {field: value}))
        with pytest.raises(CheckpointError, match=rf"{field}'? \(.*\) (is not read|changes the weights)"):
            read_adapter_settings(folder, model.config)
            pytest.fail(field)
    for field, value in (("r", 2**40), ("r", 10**6), ("lora_alpha", 1e300), ("lora_alpha", 1e-300)):
        (folder / "adapter_config.json").write_text(json.dumps(saved | {field: value}))
        with pytest.raises(CheckpointError, match="must be at least .* and at most"):
            read_adapter_settings(folder, model.config)


DAMAGES = {
    "no dims": lambda tensor: torch.tensor(1.0),
    "one dim": lambda tensor: torch.ones(5),
    "another width": lambda tensor: torch.ones(len(tensor), 3),
    "three dims": lambda tensor: torch.ones(2, 3, 4),
    "no rows": lambda tensor: torch.ones(0, 4),
    "no columns": lambda tensor: torch.ones(2, 0),
    "integers": lambda tensor: torch.ones(tensor.shape, dtype=torch.int64),
    "booleans": lambda tensor: torch.ones(tensor.shape, dtype=torch.bool),
    "8 bits": lambda tensor: torch.ones(tensor.shape).to(torch.float8_e4m3fn),
    "complex": lambda tensor: torch.ones(tensor.shape, dtype=torch.complex64),
    "infinite": lambda tensor: torch.full(tensor.shape, 1e300, dtype=torch.float64),
}


@pytest.mark.parametrize("layout", ["peft", "per-expert"])
def test_a_tensor_of_another_shape_or_dtype_is_refused_by_name_wherever_it_is(tmp_path: Path, layout: Any) -> None:
    model = adapted_model()
    export_adapter(model.config, LORA, adapters(model), tmp_path / "out", layout=layout, base_model="base")
    path = tmp_path / "out" / "adapter_model.safetensors"
    stored = load_file(path)
    keys = [key for key in stored if ".layers.2." in key]
    for number, (name, damage) in enumerate(DAMAGES.items()):
        key = keys[number % len(keys)]
        save_file(stored | {key: damage(stored[key])}, path)
        with pytest.raises(CheckpointError, match="has shape|has dtype|not finite|have different"):
            read_adapter(tmp_path / "out", model.config, LORA)
            pytest.fail(f"{key}: {name}")
