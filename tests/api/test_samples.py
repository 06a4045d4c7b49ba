"""The sampler of a run: prompts of the validation split, as text where the corpus's own tokenizer is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import moescale
from moescale.api.samples import make_sampler
from moescale.errors import ConfigError
from moescale.runtime.settings import TrainSettings

SETTINGS = TrainSettings(sample_every=1, samples=2, sample_tokens=5)


def refuse(text: str) -> None:
    raise AssertionError(text)


def test_a_run_keeps_its_samples_as_text(tmp_path, model_folder, stdlib_corpus):
    request = moescale.TrainRequest(
        model=str(model_folder),
        data=stdlib_corpus,
        output=tmp_path / "run",
        device="cpu",
        tokens_per_step=256,
        micro_batch_sequences=4,
        observers=("json_lines",),
        settings=TrainSettings(steps=3, sample_every=2, samples=2, sample_tokens=5, final_checkpoint=False),
    )
    moescale.train(request)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (found,) = [record for record in records if "samples" in record]
    sampler = make_sampler(stdlib_corpus, model_folder, SETTINGS, refuse)
    assert found["step"] == 2
    assert [sample["prompt"] for sample in found["samples"]] == [
        sampler.to_text(prompt.tokens) for prompt in sampler.prompts
    ]
    assert all(sample["answer"] for sample in found["samples"])


def test_another_tokenizer_is_not_used_for_text(tmp_path, model_folder, stdlib_corpus):
    """The one in the model's folder stands in for the corpus's where it is the same, and only then."""
    corpus = tmp_path / "corpus"
    shutil.copytree(stdlib_corpus, corpus)
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["made_from"]["tokenizer"] = str(tmp_path / "elsewhere")
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    sampler = make_sampler(corpus, model_folder, SETTINGS, refuse)
    assert sampler.end_tokens and sampler.to_text(sampler.prompts[0].tokens)[0] not in "0123456789"
    manifest["made_from"]["tokenizer_sha256"] = "0" * 64
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    notices: list[str] = []
    sampler = make_sampler(corpus, model_folder, SETTINGS, notices.append)
    assert sampler.to_text([3, 14]) == "3 14" and not sampler.end_tokens
    assert "samples are shown as ids" in notices[0]


def test_samples_need_a_validation_split(tmp_path: Path, model_folder, stdlib_corpus):
    corpus = tmp_path / "corpus"
    shutil.copytree(stdlib_corpus, corpus)
    manifest = json.loads((corpus / "manifest.json").read_text())
    for part in ("shards", "counts"):
        del manifest[part]["validation"]
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"run.sample_every \(1\) needs a validation split.*--validation-fraction"):
        make_sampler(corpus, model_folder, SETTINGS, refuse)
