"""Import and export: exact both ways, and every damage named before anything is touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moescale.config import ModelConfig
from moescale.convert.checkpoint_export import export_checkpoint
from moescale.convert.checkpoint_import import import_checkpoint
from moescale.convert.hf_config import read_model_config, to_hf_config
from moescale.convert.key_table import build_key_table
from moescale.convert.tensor_source import ModelWeights
from moescale.errors import CheckpointError, ConfigError
from moescale.models.transformer import Transformer, build_on_meta, initialize
from tiny import tiny_config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def filled_model(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 1) -> Transformer:
    model = build_on_meta(config, dtype).to_empty(device="cpu")
    initialize(model, seed)
    return model


def write_folder(folder: Path, config: ModelConfig, dtype: torch.dtype, max_shard_bytes: int = 40_000) -> Path:
    """A Hugging Face folder made by the published names alone, without the exporter."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(2)
    tensors = {
        piece.key: torch.randn(piece.shape, generator=generator).to(dtype)
        for pieces in build_key_table(config).values()
        for piece in pieces
    }
    keys = sorted(tensors, key=lambda key: hash_of(key))  # published shards follow no order we could rely on
    shards = [keys[start::3] for start in range(3)]
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-00003.safetensors"
        save_file({key: tensors[key] for key in shard}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(to_hf_config(config, str(dtype).removeprefix("torch."))))
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    return folder


def hash_of(key: str) -> int:
    return sum(ord(character) * 31**position for position, character in enumerate(key)) % 1009


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def imported(folder: Path, config: ModelConfig, dtype: torch.dtype) -> Transformer:
    model = build_on_meta(config, dtype).to_empty(device="cpu")
    import_checkpoint(folder, config, dict(model.named_parameters()))
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "overrides", [{}, {"q_lora_rank": 8, "attention_bias": True}, {"tie_embeddings": True, "num_shared_experts": 0}]
)
def test_import_then_export_gives_every_tensor_back_bit_for_bit(dtype, overrides, tmp_path):
    config = tiny_config(**overrides)
    folder = write_folder(tmp_path / "original", config, DTYPES[dtype])
    model = imported(folder, config, torch.float32 if dtype == "fp16" else DTYPES[dtype])
    report = export_checkpoint(
        config,
        ModelWeights(dict(model.named_parameters())),
        tmp_path / "exported",
        reference=folder,
        dtype=DTYPES[dtype],
        max_shard_bytes=40_000,
    )
    before, after = all_tensors(folder), all_tensors(tmp_path / "exported")
    assert before.keys() == after.keys() and report.num_tensors == len(before)
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype and torch.equal(after[key].view(torch.uint8), tensor.view(torch.uint8))
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "exported" / name).read_bytes() == (folder / name).read_bytes()
    sizes = [path.stat().st_size for path in (tmp_path / "exported").glob("*.safetensors")]
    assert len(sizes) == report.num_shards > 1


def test_stacked_experts_hold_gate_rows_before_up_rows(tmp_path):
    config = tiny_config()
    folder = write_folder(tmp_path / "original", config, torch.float32)
    stored, model = all_tensors(folder), imported(folder, config, torch.float32)
    gate_up = model.get_parameter("layers.1.feed_forward.experts.gate_up")
    for expert in range(8):
        prefix = f"model.layers.1.mlp.experts.{expert}"
        assert torch.equal(gate_up[expert, :24], stored[f"{prefix}.gate_proj.weight"])
        assert torch.equal(gate_up[expert, 24:], stored[f"{prefix}.up_proj.weight"])


def test_parts_of_parameters_import_what_lies_in_them(tmp_path):
    config = tiny_config()
    folder = write_folder(tmp_path / "original", config, torch.float32)
    whole = dict(imported(folder, config, torch.float32).named_parameters())
    parts = {}
    for number, (name, parameter) in enumerate(whole.items()):
        start = [number % max(1, size // 2) for size in parameter.shape]
        parts[name] = tuple(
            slice(s, s + max(1, size - s - number % 3)) for s, size in zip(start, parameter.shape, strict=True)
        )
    pieces = {name: torch.full_like(whole[name][parts[name]], torch.nan) for name in whole}
    import_checkpoint(folder, config, pieces, parts=parts)
    for name, piece in pieces.items():
        assert torch.equal(piece, whole[name][parts[name]]), name


def test_export_opens_in_transformers_with_tokenizer_and_the_same_logits(tmp_path, model_folder):
    config = read_model_config(model_folder)
    model = filled_model(config)
    weights = ModelWeights(dict(model.named_parameters()))
    export_checkpoint(config, weights, tmp_path / "out", reference=model_folder, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.float32  # config.json of the reference named another dtype, or none
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("def main():\n    return 0", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_a_published_config_with_auto_map_opens_without_remote_code(tmp_path):
    config = tiny_config()
    reference = tmp_path / "reference"
    reference.mkdir()
    names = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"}
    (reference / "config.json").write_text(json.dumps(to_hf_config(config) | {"auto_map": names}))
    (reference / "modeling_deepseek.py").write_text("raise RuntimeError('remote code was run')")
    weights = ModelWeights(dict(filled_model(config).named_parameters()))
    export_checkpoint(config, weights, tmp_path / "out", reference=reference, dtype=torch.bfloat16)
    assert (tmp_path / "out" / "modeling_deepseek.py").is_file()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert type(model).__module__.startswith("transformers.")


def damage_missing(folder: Path) -> None:
    rewrite(folder, "model.layers.1.mlp.experts.3.up_proj.weight", None)


def damage_extra(folder: Path) -> None:
    rewrite(folder, "model.layers.9.mlp.gate.weight", torch.zeros(2))


def damage_shape(folder: Path) -> None:
    rewrite(folder, "model.layers.2.mlp.gate.weight", torch.zeros(7, 32))


def damage_dtype(folder: Path) -> None:
    rewrite(folder, "model.norm.weight", torch.zeros(32, dtype=torch.float64))


def damage_truncated(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def damage_absent_shard(folder: Path) -> None:
    (folder / "model-00003-of-00003.safetensors").unlink()


def damage_no_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def damage_twice(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    save_file(load_file(path) | {"model.norm.weight": torch.zeros(32)}, path)
    path = folder / "model-00001-of-00003.safetensors"
    save_file(load_file(path) | {"model.norm.weight": torch.zeros(32)}, path)


def damage_only_pickle(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def damage_weight_map_list(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["model-00001-of-00003.safetensors"]}')


def damage_weight_map_values(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": 1}}')


def rewrite(folder: Path, key: str, tensor: torch.Tensor | None) -> None:
    """Replace, add or drop a tensor, index included."""
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    name = index["weight_map"].pop(key, "model-00001-of-00003.safetensors")
    tensors = load_file(folder / name)
    tensors.pop(key, None)
    if tensor is not None:
        tensors[key] = tensor
        index["weight_map"][key] = name
    save_file(tensors, folder / name)
    index_path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, r"lacks tensor 'model.layers.1.mlp.experts.3.up_proj.weight' \(1 missing"),
        (damage_extra, r"tensor 'model.layers.9.mlp.gate.weight' has no place in the model"),
        (damage_shape, r"'model.layers.2.mlp.gate.weight' has shape \(7, 32\), config.json asks for \(8, 32\)"),
        (damage_dtype, r"'model.norm.weight' has dtype F64; supported are BF16, F16, F32"),
        (damage_truncated, r"model-00002-of-00003.safetensors: truncated or damaged"),
        (damage_absent_shard, r"model-00003-of-00003.safetensors: missing; .* says it holds"),
        (damage_no_index, r"3 shards .* but no model.safetensors.index.json"),
        (damage_twice, r"tensor 'model.norm.weight' is also in model-00001-of-00003.safetensors"),
        (damage_weight_map_list, r"model.safetensors.index.json: weight_map \(a list\) must be of type dict"),
        (
            damage_weight_map_values,
            r"model.safetensors.index.json: weight_map.model.norm.weight \(1\) must be of type str",
        ),
        (damage_only_pickle, r"holds no \*.safetensors weights; convert pytorch_model.bin"),
    ],
)
def test_damage_is_named_before_any_parameter_is_touched(damage, message, tmp_path):
    config = tiny_config()
    folder = write_folder(tmp_path / "original", config, torch.float32)
    damage(folder)
    parameters = {name: torch.full(p.shape, 7.0) for name, p in build_on_meta(config, torch.float32).named_parameters()}
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(folder, config, parameters)
    assert all(bool((parameter == 7.0).all()) for parameter in parameters.values())


def test_a_tied_model_may_carry_its_embedding_twice_only_if_equal(tmp_path):
    config = tiny_config(tie_embeddings=True)
    folder = write_folder(tmp_path / "original", config, torch.float32)
    embedding = all_tensors(folder)["model.embed_tokens.weight"]
    rewrite(folder, "lm_head.weight", embedding.clone())
    imported(folder, config, torch.float32)
    rewrite(folder, "lm_head.weight", embedding + 1)
    with pytest.raises(CheckpointError, match="'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        imported(folder, config, torch.float32)


class TestFailedExport:
    @pytest.fixture
    def config(self):
        return tiny_config()

    @pytest.fixture
    def parameters(self, config):
        return dict(filled_model(config).named_parameters())

    @pytest.fixture
    def reference(self, config, tmp_path):
        folder = tmp_path / "reference"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(to_hf_config(config)))
        return folder

    def export(self, config, parameters, reference, output, dtype=torch.float32):
        with torch.no_grad():
            export_checkpoint(config, ModelWeights(parameters), output, reference=reference, dtype=dtype)

    @pytest.mark.parametrize(
        ("name", "value", "dtype", "message"),
        [
            ("layers.2.feed_forward.experts.down", float("nan"), torch.float32, "experts.5.down_proj.weight' is not"),
            ("norm.weight", 1e6, torch.float16, "'model.norm.weight' overflows float16"),
        ],
    )
    def test_a_value_that_cannot_be_written_leaves_nothing(
        self, name, value, dtype, message, config, parameters, reference, tmp_path
    ):
        with torch.no_grad():
            parameters[name][5] = value
        with pytest.raises(CheckpointError, match=message):
            self.export(config, parameters, reference, tmp_path / "out", dtype)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["reference"]

    def test_a_missing_parameter_is_named(self, config, parameters, reference, tmp_path):
        del parameters["layers.1.feed_forward.router.weight"]
        with pytest.raises(CheckpointError, match="lack parameter 'layers.1.feed_forward.router.weight'"):
            self.export(config, parameters, reference, tmp_path / "out")

    def test_an_existing_folder_is_not_overwritten(self, config, parameters, reference, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        with pytest.raises(CheckpointError, match="already exists"):
            self.export(config, parameters, reference, tmp_path / "out")
        assert (tmp_path / "out" / "notes.txt").read_text() == "mine"

    def test_a_reference_of_another_model_is_refused(self, config, parameters, reference, tmp_path):
        (reference / "config.json").write_text(json.dumps(to_hf_config(tiny_config(top_k=3))))
        with pytest.raises(ConfigError, match="describes another model"):
            self.export(config, parameters, reference, tmp_path / "out")

    def test_an_empty_current_folder_can_be_the_output(self, config, parameters, reference, tmp_path, monkeypatch):
        (tmp_path / "out").mkdir()
        monkeypatch.chdir(tmp_path / "out")
        self.export(config, parameters, reference, Path("."))
        assert (tmp_path / "out" / "model.safetensors").is_file()

    def test_leftovers_of_an_interrupted_export_do_no_harm(self, config, parameters, reference, tmp_path):
        shutil.copytree(reference, tmp_path / ".out.incomplete")
        self.export(config, parameters, reference, tmp_path / "out")
        assert not (tmp_path / ".out.incomplete").exists() and (tmp_path / "out" / "model.safetensors").is_file()


def test_a_model_that_transformers_computes_differently_exports_with_a_warning(tmp_path):
    config = tiny_config(normalize_topk=True)
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(config)))
    weights = ModelWeights(dict(filled_model(config).named_parameters()))
    report = export_checkpoint(config, weights, tmp_path / "out", reference=tmp_path, dtype=torch.float32)
    assert any("norm_topk_prob" in warning for warning in report.warnings)


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], config: ModelConfig) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_hf_config(config, "float32")))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def assert_same_parameters(first: Transformer, second: Transformer) -> None:
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_experts_fused_by_transformers_are_read_whole_and_in_parts(tmp_path):
    config = tiny_config()
    original = write_folder(tmp_path / "original", config, torch.float32)
    tensors = all_tensors(original)
    for layer in range(config.num_layers):
        if not config.is_moe_layer(layer):
            continue
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            [tensors.pop(f"{prefix}{expert}.{part}_proj.weight") for expert in range(config.num_experts)]
            for part in ("gate", "up", "down")
        )
        tensors[f"{prefix}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        tensors[f"{prefix}down_proj"] = torch.stack(down)
    fused = write_tensors(tmp_path / "fused", tensors, config)
    whole = imported(original, config, torch.float32)
    assert_same_parameters(whole, imported(fused, config, torch.float32))
    parts = {
        name: tuple(slice(size // 2 if dim == 0 and size > 1 else 0, size) for dim, size in enumerate(parameter.shape))
        for name, parameter in whole.named_parameters()
    }
    targets = {name: torch.empty_like(parameter[parts[name]]) for name, parameter in whole.named_parameters()}
    import_checkpoint(fused, config, targets, parts=parts)
    for name, parameter in whole.named_parameters():
        assert torch.equal(targets[name], parameter[parts[name]]), name


def test_fused_experts_of_another_shape_are_refused(tmp_path):
    config = tiny_config()
    tensors = all_tensors(write_folder(tmp_path / "original", config, torch.float32))
    layer = next(layer for layer in range(config.num_layers) if config.is_moe_layer(layer))
    tensors = {key: tensor for key, tensor in tensors.items() if f"layers.{layer}.mlp.experts." not in key}
    tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.zeros(1, 2, 3)
    tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.zeros(1, 2, 3)
    with pytest.raises(CheckpointError, match=r"gate_up_proj' has shape \(1, 2, 3\), config.json asks for"):
        imported(write_tensors(tmp_path / "fused", tensors, config), config, torch.float32)


def test_a_tied_folder_may_hold_its_embedding_under_either_name(tmp_path):
    config = tiny_config(tie_embeddings=True)
    original = write_folder(tmp_path / "original", config, torch.float32)
    tensors = all_tensors(original)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    head_only = write_tensors(tmp_path / "head", tensors, config)
    assert_same_parameters(imported(original, config, torch.float32), imported(head_only, config, torch.float32))


def test_an_index_may_list_the_other_name_of_a_tied_embedding_and_files_in_folders(tmp_path):
    config = tiny_config(tie_embeddings=True)
    folder = write_folder(tmp_path / "original", config, torch.float32)
    expected = imported(folder, config, torch.float32)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00003.safetensors"
    (folder / "w").mkdir()
    (folder / "model-00002-of-00003.safetensors").rename(folder / "w" / "part.safetensors")
    index["weight_map"] = {
        key: "w/part.safetensors" if name.startswith("model-00002") else name
        for key, name in index["weight_map"].items()
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_parameters(expected, imported(folder, config, torch.float32))
    index["weight_map"]["model.extra.weight"] = "w/part.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks tensor 'model.extra.weight', .* left-over; fetch both again"):
        imported(folder, config, torch.float32)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "w/../../x.safetensors", "", "w//x"])
def test_an_index_leads_nowhere_outside_its_folder(name, tmp_path):
    folder = write_folder(tmp_path / "original", tiny_config(), torch.float32)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"weight_map.model.norm.weight \(.*\) must be a path below"):
        imported(folder, tiny_config(), torch.float32)
