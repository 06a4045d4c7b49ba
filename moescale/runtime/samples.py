"""Generates samples during a run: the model continues prompts of the validation split."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from moescale.models.greedy import decode_greedily
from moescale.models.transformer import Transformer
from moescale.report.metrics import Sample
from moescale.runtime.ranks import Ranks


class PromptTokens(Protocol):
    """A prompt from the data."""

    @property
    def sequence(self) -> int: ...

    @property
    def tokens(self) -> list[int]: ...

    @property
    def wanted(self) -> list[int]: ...


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Continues ``prompts`` by greedy decoding."""

    prompts: Sequence[PromptTokens]
    max_tokens: int
    """Maximum length of an answer."""
    end_tokens: Collection[int]
    """Tokens that end an answer; they are part of it."""
    to_text: Callable[[list[int]], str]

    def samples(self, model: Transformer, ranks: Ranks, on_prompt: Callable[[], None]) -> list[Sample]:
        """Continue every prompt. A collective of ``ranks``, which may shard ``model``; all return the same.

        Layers run uncompiled, because a compiled layer would be recompiled for every length.
        """

        end_tokens = ranks.gather(list(self.end_tokens))[0]  # other hosts may lack the tokenizer

        def agree(token: int) -> int:
            return ranks.gather(token)[0]

        def answers() -> Iterable[Sample]:
            for prompt in self.prompts:
                on_prompt()
                answer = decode_greedily(
                    model, prompt.tokens, max_tokens=self.max_tokens, end_tokens=end_tokens, agree=agree
                )
                yield Sample(
                    sequence=prompt.sequence,
                    prompt=self.to_text(prompt.tokens),
                    answer=self.to_text(answer),
                    wanted=self.to_text(prompt.wanted[: self.max_tokens]),
                )

        was_training = model.training
        model.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                return list(answers())
        finally:
            model.train(was_training)
