"""Sets up the samples of a run: prompts from its corpus, and the tokenizer to decode them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moescale.data.corpus import open_corpus
from moescale.data.corpus.manifest import recorded_origin
from moescale.data.prepare.tokenizer import CorpusTokenizer, load_recorded_tokenizer
from moescale.data.prompts import find_prompts
from moescale.errors import ConfigError, MoescaleError
from moescale.runtime.samples import Sampler
from moescale.runtime.settings import TrainSettings


def make_sampler(data: Path, model: Path, settings: TrainSettings, warn: Callable[[str], None]) -> Sampler:
    """Return a sampler for prompts of the validation split of ``data``, with the tokenizer the corpus was made with.

    The tokenizer is the one its manifest names, or the one in the folder ``model``. Without either, ``warn`` is called,
    tokens are shown as ids, and only the maximum length ends an answer.

    Raises:
        ConfigError: there is no validation split, or it contains no prompt.
    """
    corpus = open_corpus(data, split="validation", missing_ok=True)
    if corpus is None:
        raise ConfigError(
            f"run.sample_every ({settings.sample_every}) needs a validation split, which {data} lacks; prepare it with "
            "--validation-fraction"
        )
    prompts = find_prompts(corpus, settings.samples)
    if not prompts:
        raise ConfigError(
            f"run.sample_every ({settings.sample_every}) finds no prompt in {corpus.name}: no document there has a "
            "target after its first token; prepare another corpus, or give 0"
        )
    tokenizer = _tokenizer(data, model)
    if tokenizer is None:
        warn(f"the tokenizer of {data} is neither where its manifest says nor in {model}; samples are shown as ids")
        return Sampler(
            prompts=prompts,
            max_tokens=settings.sample_tokens,
            end_tokens=(),
            to_text=lambda tokens: " ".join(map(str, tokens)),
        )
    return Sampler(
        prompts=prompts,
        max_tokens=settings.sample_tokens,
        end_tokens=(tokenizer.end_token_id,),
        to_text=lambda tokens: tokenizer.tokenizer.decode(tokens, skip_special_tokens=False),
    )


def _tokenizer(data: Path, model: Path) -> CorpusTokenizer | None:
    made_from = recorded_origin(data)
    for candidate in (made_from.get("tokenizer"), str(model)):
        # A name that is not a path would be downloaded from the hub by every rank.
        if not isinstance(candidate, str) or not Path(candidate).exists():
            continue
        try:
            return load_recorded_tokenizer(candidate, made_from, data)
        except (MoescaleError, OSError):
            continue
    return None
