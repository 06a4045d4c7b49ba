"""Reads a Hugging Face config.json into a ModelConfig, and writes one from it. Imports no torch.

The fields are defined by the model's family (``moescale.models.<family>.hf``), which ``model_type`` selects.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from moescale.config import ModelConfig
from moescale.errors import ConfigError, nearest
from moescale.hub import fetch_repository, looks_like_path, nearest_here
from moescale.models.registry import FAMILIES, family_of, find_family
from moescale.records import FileKind, read_json_object

CONFIG_FILE = "config.json"
_FILE = FileKind(
    noun="a config.json",
    missing="missing; give the folder of a Hugging Face model",
    remedy="fetch it again",
    max_bytes=2**24,
)
PRESETS = (
    *("deepseek-coder-v2-lite", "deepseek-v2", "deepseek-v2-lite", "glm-4.7-flash", "gpt-oss-20b"),
    *("moonlight-16b-a3b", "olmoe-1b-7b", "qwen3-30b-a3b"),
    *("tiny", "tiny-deepseek-v3", "tiny-glm4-moe-lite", "tiny-gpt-oss", "tiny-olmoe"),
)
_HUB_NAMES = {
    "deepseek-ai/DeepSeek-Coder-V2-Base": "deepseek-v2",
    "deepseek-ai/DeepSeek-Coder-V2-Instruct": "deepseek-v2",
    "deepseek-ai/DeepSeek-Coder-V2-Lite-Base": "deepseek-coder-v2-lite",
    "deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct": "deepseek-coder-v2-lite",
    "deepseek-ai/DeepSeek-V2": "deepseek-v2",
    "deepseek-ai/DeepSeek-V2-Chat": "deepseek-v2",
    "deepseek-ai/DeepSeek-V2-Lite": "deepseek-v2-lite",
    "deepseek-ai/DeepSeek-V2-Lite-Chat": "deepseek-v2-lite",
    "Qwen/Qwen3-30B-A3B-Base": "qwen3-30b-a3b",
    "allenai/OLMoE-1B-7B-0924": "olmoe-1b-7b",
    "openai/gpt-oss-20b": "gpt-oss-20b",
    "zai-org/GLM-4.7-Flash": "glm-4.7-flash",
    "moonshotai/Moonlight-16B-A3B": "moonlight-16b-a3b",
    "moonshotai/Moonlight-16B-A3B-Instruct": "moonlight-16b-a3b",
}
"""Published models whose configuration is a preset, so that planning needs no download."""


def resolve_model(name: str, *, config_only: bool = False) -> Path:
    """Return the local folder of a model given as a folder, a preset or a hub name (downloaded once, then cached).

    With ``config_only`` the folder need only contain a config.json, and published models are not downloaded.
    Raises ConfigError if there is no such model.
    """
    if not name.strip():
        raise ConfigError(f"model ('{name}') is empty; give a folder with a {CONFIG_FILE}, a preset, or a hub name")
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_file() and path.name == CONFIG_FILE:
        return path.parent
    if name in PRESETS:
        return _preset_folder(name)
    if config_only and name in _HUB_NAMES:
        return _preset_folder(_HUB_NAMES[name])
    if name.count("/") == 1 and not looks_like_path(name):
        return _download(name, config_only)
    if path.is_file():
        raise ConfigError(f"model '{name}' is a file; give the folder that holds its {CONFIG_FILE}, {path.parent}")
    if looks_like_path(name):
        raise ConfigError(
            f"model '{name}' does not exist{nearest_here(path)}; give a folder with a {CONFIG_FILE}, a preset, or a "
            "hub name (owner/name)"
        )
    raise ConfigError(
        f"model '{name}' is neither a folder nor a preset ({', '.join(PRESETS)}) nor a hub name (owner/name)"
        f"{nearest_here(path) or nearest(name, PRESETS)}"
    )


def read_model_config(model: str | Path, ignored_fields: Collection[str] = ()) -> ModelConfig:
    """Read the configuration of a model: a folder with a config.json, or any name :func:`resolve_model` takes.

    Raises ConfigError naming file and field if a field is missing, has an unsupported value, or is unknown and not in
    ``ignored_fields``.
    """
    folder = resolve_model(str(model), config_only=True)
    return parse_hf_config(read_hf_config(folder), str(folder / CONFIG_FILE), ignored_fields)


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Return the JSON object in the folder's config.json. Raises ConfigError if there is none."""
    return read_json_object(folder / CONFIG_FILE, _FILE)


def parse_hf_config(
    document: Mapping[str, Any], path: str = CONFIG_FILE, ignored_fields: Collection[str] = ()
) -> ModelConfig:
    """Translate the fields of a config.json; ``path`` names the file in errors. Raises ConfigError."""
    if "model_type" not in document:
        raise ConfigError(f"{path}: field 'model_type' is missing; it must be {' or '.join(sorted(FAMILIES))}")
    try:
        family = find_family(document["model_type"])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    for name in ignored_fields:
        if name in family.hf_fields:
            raise ConfigError(f"--ignore-config-field {name}: it decides what is trained and cannot be ignored")
        if name not in document:
            raise ConfigError(f"--ignore-config-field {name}: {path} has no such field{nearest(name, document)}")
    return family.read_hf({name: value for name, value in document.items() if name not in ignored_fields}, path)


def to_hf_config(config: ModelConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """Return a config.json for ``config``, the inverse of :func:`parse_hf_config`.

    Args:
        dtype: name of the torch dtype of the model's weights.
    """
    return family_of(config).write_hf(config, dtype)


def transformers_differences(config: ModelConfig) -> list[str]:
    """Return the differences between transformers and the published definition of this model."""
    return family_of(config).transformers_differences(config)


def _preset_folder(name: str) -> Path:
    return Path(str(files("moescale") / "presets" / name))


def _download(name: str, config_only: bool) -> Path:
    patterns = [CONFIG_FILE] if config_only else ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
    return fetch_repository(name, patterns, what="model", error=ConfigError)
