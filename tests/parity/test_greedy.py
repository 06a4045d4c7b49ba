"""Greedy decoding with the key/value cache: as without one, and as transformers' `generate`, for every family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from moescale.config import ModelConfig
from moescale.models.cache import KeyValueCache
from moescale.models.greedy import decode_greedily
from moescale.models.registry import FAMILIES
from moescale.models.transformer import Transformer
from tests.parity import test_deepseek_v3, test_glm4_moe_lite, test_gpt_oss, test_olmoe, test_parity, test_qwen3_moe
from tests.parity.test_parity import build, error, export, initialized, load

CONFIGS: dict[str, Callable[[], ModelConfig]] = {
    "deepseek_v2": lambda: build(test_parity.CONFIGURATIONS["yarn"])[0],
    "deepseek_v3": lambda: test_deepseek_v3.TINY,
    "glm4_moe_lite": lambda: test_glm4_moe_lite.TINY,
    "gpt_oss": lambda: test_gpt_oss.TINY,
    "olmoe": lambda: dataclasses.replace(test_olmoe.TINY, **test_olmoe.CONFIGURATIONS["shared_heads_of_keys"]),
    "qwen3_moe": lambda: test_qwen3_moe.TINY,
}
PROMPT = [5, 17, 80, 3, 41, 9, 62, 28, 77, 1, 50]
NEW_TOKENS = 24


def decode_anew(model: Transformer, prompt: list[int], number: int) -> list[int]:
    """The definition: the whole text is read again for every token."""
    tokens = list(prompt)
    for _ in range(number):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_every_family_is_decoded_below():
    assert CONFIGS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", CONFIGS)
def test_the_cache_changes_no_logit_however_the_text_is_cut(family):
    model = initialized(CONFIGS[family]())
    tokens = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(tokens).logits
        cache = KeyValueCache(model.config.num_layers, 20)
        parts = [model(part, cache=cache).logits for part in tokens.split([9, 1, 1, 5, 4], dim=1)]
    assert error(torch.cat(parts, dim=1), whole) < 1e-5


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_decoding_with_the_cache_is_that_without(family):
    model = initialized(CONFIGS[family]())
    decoded = decode_greedily(model, PROMPT, max_tokens=NEW_TOKENS)
    assert decoded == decode_anew(model, PROMPT, NEW_TOKENS)
    assert len(set(decoded)) > 3  # not a loop of one token, which anything would repeat


@pytest.mark.parametrize(
    "family", [name if name == "gpt_oss" else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_greedy_decoding_is_that_of_transformers(family, tmp_path):
    config = CONFIGS[family]()
    model = initialized(config)
    published = load(export(config, model, tmp_path), torch.float32)
    wanted = published.generate(
        torch.tensor([PROMPT]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert decode_greedily(model, PROMPT, max_tokens=NEW_TOKENS) == wanted[0, len(PROMPT) :].tolist()


def test_decoding_ends_with_an_end_token():
    model = initialized(CONFIGS["qwen3_moe"]())
    whole = decode_greedily(model, PROMPT, max_tokens=NEW_TOKENS)
    end = whole[5]
    assert decode_greedily(model, PROMPT, max_tokens=NEW_TOKENS, end_tokens=[end]) == whole[: whole.index(end) + 1]
