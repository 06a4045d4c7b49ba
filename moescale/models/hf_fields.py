"""Checks of the fields of a Hugging Face config.json, for every family. Imports no torch.

Every field is either translated, checked against the values that are supported, or known not to touch the mathematics
of training; any other is an error, because ignoring it could train another model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moescale.errors import ConfigError, nearest
from moescale.records import show

# Fields that do not change what is trained: bookkeeping, generation, the inference engine.
_HARMLESS = frozenset(
    "architectures auto_map bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id "
    "torch_dtype dtype transformers_version use_cache pretraining_tp ep_size _name_or_path name_or_path "
    "output_attentions output_hidden_states output_router_logits return_dict return_dict_in_generate id2label "
    "label2id problem_type chunk_size_feed_forward head_dim qk_head_dim _attn_implementation attn_implementation "
    "_experts_implementation experts_implementation torchscript use_bfloat16 tokenizer_class task_specific_params "
    "finetuning_task prefix is_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder "
    "model_max_length".split()
)
# How text is sampled, which older writers leave in config.json too: the fields of transformers' GenerationConfig.
_GENERATION = frozenset(
    "assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind bad_words_ids "
    "begin_suppress_tokens cache_config cache_implementation compile_config constraints continuous_batching_config "
    "disable_compile diversity_penalty do_sample dola_layers early_stopping encoder_no_repeat_ngram_size "
    "encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty force_words_ids "
    "forced_bos_token_id forced_eos_token_id guidance_scale is_assistant length_penalty low_memory max_cache_len "
    "max_length max_matching_ngram_size max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size "
    "num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_logits "
    "output_scores penalty_alpha prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values "
    "renormalize_logits repetition_penalty sequence_bias speculation_type stop_strings suppress_tokens "
    "target_lookbehind temperature tf_legacy_loss token_healing top_h top_k top_p typical_p use_mtp "
    "watermarking_config".split()
)
_BOOKKEEPING = re.compile(r"_?(attn|experts)_implementation\w*|\w+_version|_from_model_config|_commit_hash|unsloth_\w+")
"""Names under which writers sign their work or keep how they opened the folder."""
_HARMLESS_EMPTY = frozenset({"pruned_heads"})
"""Harmless where empty."""
CLOSE = 0.8
"""How alike two names of fields must be for one to be taken for a misspelling of the other."""


@dataclass(frozen=True, kw_only=True)
class FieldRules:
    """What a family knows of the fields of its config.json."""

    only: Mapping[str, tuple[Any, ...]]
    """Fields with one supported value, each with the values that mean it, the one to name first."""
    required: tuple[str, ...]
    """Fields without which the model is not known."""
    integers: frozenset[str]
    numbers: frozenset[str]
    flags: frozenset[str]
    texts: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()
    """Fields that are checked where they are translated."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of a field, which must agree with it where both are given."""
    absent: Mapping[str, Any] = field(default_factory=dict)
    """What a field means that is not there, where an alias has to agree with that."""

    @property
    def known(self) -> frozenset[str]:
        """What decides what is trained."""
        return self.integers | self.numbers | self.flags | self.texts | self.others | self.only.keys()

    def check(self, document: Mapping[str, Any], path: str) -> None:
        """Raise ConfigError, naming the field, for what is not known, not supported, missing or of a wrong type."""
        for name, supported in self.only.items():
            if name in document and document[name] not in supported:
                raise ConfigError(
                    f"{path}: {name} ({show(document[name])}) is not supported; it must be {supported[0]!r}"
                )
        for name, value in document.items():
            if name not in self.known and not is_harmless(name, value):
                raise ConfigError(
                    f"{path}: field '{name}' ({show(value)}) is not known and may change the mathematics of the "
                    f"model{nearest(name, self.known, cutoff=CLOSE)}; if it does not, pass --ignore-config-field {name}"
                )
        for name, value in document.items():
            problem = self._wrong_type(name, value)
            if problem:
                raise ConfigError(f"{path}: {name} ({show(value)}) {problem}")
        for alias, name in self.aliases.items():
            value = document.get(name)
            if document.get(alias) is not None and document[alias] != (
                self.absent.get(name) if value is None else value
            ):
                raise ConfigError(
                    f"{path}: {alias} ({show(document[alias])}) and {name} ({show(value)}) differ; {name} is the one "
                    f"that counts: set it, and remove {alias}"
                )
        for name in self.required:
            if document.get(name) is None:
                raise ConfigError(f"{path}: field '{name}' is missing; it decides the shape of the model")

    def _wrong_type(self, name: str, value: Any) -> str | None:
        """What is wrong with a field's value by itself, or None; null stands for an absent field."""
        if value is None:
            return None
        if name in self.flags and not isinstance(value, bool):
            return f"must be true or false, not {json_type(value)}"
        if name in self.integers:
            return wrong_integer(value) or ("must not be negative" if value < 0 else None)
        if name in self.numbers:
            return wrong_number(value)
        if name in self.texts and not isinstance(value, str):
            return f"must be a text, not {json_type(value)}"
        return None


def is_harmless(name: str, value: Any) -> bool:
    """Whether a field has no part in training, whatever the family."""
    if value is None or name in _HARMLESS or name in _GENERATION or _BOOKKEEPING.fullmatch(name):
        return True
    return name in _HARMLESS_EMPTY and not value


def wrong_integer(value: Any) -> str | None:
    """Return what is wrong with an integer field's value, or None."""
    if not isinstance(value, int) or isinstance(value, bool):
        return f"must be an integer, not {json_type(value)}"
    return None


def wrong_number(value: Any) -> str | None:
    """Return what is wrong with a number field's value, or None."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return f"must be a number, not {json_type(value)}"
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        finite = False
    return None if finite else "must be finite"


def json_type(value: Any) -> str:
    """Return the name of a value's type in JSON, with its article."""
    names = {str: "a text", bool: "a truth value", int: "an integer", float: "a number with a fraction"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")


def value_or(document: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return a field's value; ``default`` where it is absent or null."""
    value = document.get(name)
    return default if value is None else value
