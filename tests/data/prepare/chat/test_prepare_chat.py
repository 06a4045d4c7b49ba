"""`prepare` of conversations: forms, packing, targets, faults, hostile templates."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from chat_templates import CONVERSATIONS, MARKED
from moescale.data.batch import read_batch
from moescale.data.corpus import NO_TARGET, open_corpus, verify
from moescale.data.corpus.manifest import read_manifest
from moescale.data.prepare import prepare
from moescale.errors import DataError

_MESSAGES = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It."}]
FORMS = {
    "messages": {"messages": _MESSAGES},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "It."}]},
    "completion": {"prompt": "Say it.", "completion": "It."},
    "completion of messages": {"prompt": _MESSAGES[:1], "completion": _MESSAGES[1:]},
    "instruction": {"instruction": "Say it.", "input": "", "output": "It."},
}


@pytest.fixture
def chat_tokenizer(tmp_path: Path, model_folder: Path):
    """Make a tokenizer's folder with a template."""

    def make(template: str = MARKED["tools"], name: str = "tokenizer") -> Path:
        folder = tmp_path / name
        shutil.copytree(model_folder, folder)
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


def write(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def learned_texts(output: Path, tokenizer: Path) -> list[tuple[str, str]]:
    """Return the text of every conversation of a corpus and the part of it that is learned."""
    from tokenizers import Tokenizer

    decode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode
    corpus = open_corpus(output)
    verify(corpus)
    found = []
    for index in range(corpus.num_sequences):
        sequence = corpus.sequence(index)
        cuts = np.flatnonzero(sequence.document_starts)[1:]
        parts = zip(np.split(sequence.tokens, cuts), np.split(sequence.labels, cuts), strict=True)
        for tokens, labels in parts:
            if (labels != NO_TARGET).any():
                found.append((decode(tokens.tolist()), decode(labels[labels != NO_TARGET].tolist())))
            else:
                assert set(tokens.tolist()) == {0}  # padding
    return found


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_found_by_their_columns(settings, tmp_path, chat_tokenizer, form):
    source, tokenizer = write(tmp_path / "data.jsonl", [FORMS[form]] * 3), chat_tokenizer()
    report = prepare(settings(source, tokenizer=str(tokenizer), sequence_length=128), progress=False)
    text = "<|im_start|>user\nSay it.<|im_end|>\n<|im_start|>assistant\nIt.<|im_end|>\n"
    assert learned_texts(tmp_path / "output", tokenizer) == [(text, "It.<|im_end|>\n")] * 3
    assert (report.documents, report.bad) == (3, {})


@pytest.mark.parametrize("kind", ["array", "parquet", "arrow", "csv"])
def test_every_kind_of_file_gives_the_same_corpus(settings, tmp_path, chat_tokenizer, kind):
    import datasets
    import pyarrow
    from pyarrow import parquet

    tokenizer = str(chat_tokenizer())
    records = [CONVERSATIONS["several turns"], CONVERSATIONS["one turn"]]
    if kind == "csv":
        records = [{"prompt": f'Say\n"{n}"', "completion": f"It, {n}."} for n in range(2)]
    source = tmp_path / f"data.{kind}"
    if kind == "array":
        source = tmp_path / "data.json"
        source.write_text(json.dumps(records, indent=1))
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), source)
    elif kind == "arrow":
        datasets.Dataset.from_list(records).save_to_disk(source)
    else:
        datasets.Dataset.from_list(records).to_csv(source)
    lines = write(tmp_path / "lines.jsonl", records)
    results = []
    for number, path in enumerate((source, lines)):
        output = tmp_path / f"output{number}"
        prepare(settings(path, tokenizer=tokenizer, sequence_length=256, output=output), progress=False)
        results.append((open_corpus(output).fingerprint, len(learned_texts(output, Path(tokenizer)))))
    assert results[0] == results[1]
    assert results[0][1] == 2


def test_targets_are_the_answers_and_no_conversation_sees_another(settings, tmp_path, chat_tokenizer):
    source = write(tmp_path / "data.jsonl", [CONVERSATIONS["tools"], CONVERSATIONS["several turns"]] * 10)
    prepare(settings(source, tokenizer=str(chat_tokenizer()), sequence_length=1024), progress=False)
    corpus = open_corpus(tmp_path / "output")
    batch = read_batch(corpus, np.arange(corpus.num_sequences))
    starts, targets = batch.document_starts.numpy(), batch.targets.numpy()
    assert (targets[:, :-1][starts[:, 1:]] == NO_TARGET).all()
    assert corpus.has_padding and (targets[batch.padding.numpy()] == NO_TARGET).all()
    assert int(batch.padding.sum()) == read_manifest(tmp_path / "output").counts["train"].tokens_padding
    is_learned = targets[:, :-1] != NO_TARGET
    assert 0.2 < is_learned.mean() < 0.8
    assert (targets[:, :-1][is_learned] == batch.tokens.numpy()[:, 1:][is_learned]).all()


def test_loss_on_chooses_what_is_learned(settings, tmp_path, chat_tokenizer):
    source, tokenizer = write(tmp_path / "data.jsonl", [CONVERSATIONS["several turns"]]), chat_tokenizer()
    found = {}
    for loss_on in ("answers", "last-answer", "all"):
        output = tmp_path / loss_on
        prepare(
            settings(source, tokenizer=str(tokenizer), sequence_length=512, output=output, loss_on=loss_on),
            progress=False,
        )
        [(text, found[loss_on])] = learned_texts(output, tokenizer)
    assert found["answers"] == "Four.\n\nIndeed: 漢字, é.<|im_end|>\nYes, f.<|im_end|>\n"
    assert found["last-answer"] == "Yes, f.<|im_end|>\n"
    assert found["all"] == text[1:]  # the first token follows nothing


def test_a_completion_is_learned_and_answers_in_its_prompt_are_not(settings, tmp_path, chat_tokenizer):
    record = {"prompt": [*_MESSAGES, _MESSAGES[0]], "completion": [{"role": "assistant", "content": "Again."}]}
    exempt = {"messages": [*_MESSAGES[:1], _MESSAGES[1] | {"weight": 0}, _MESSAGES[0], _MESSAGES[1] | {"content": "B"}]}
    source, tokenizer = write(tmp_path / "data.jsonl", [record, exempt]), chat_tokenizer()
    prepare(settings(source, tokenizer=str(tokenizer), sequence_length=512), progress=False)
    learned = sorted(learned for _, learned in learned_texts(tmp_path / "output", tokenizer))
    assert learned == ["Again.<|im_end|>\n", "B<|im_end|>\n"]


@pytest.mark.parametrize("too_long", ["drop", "split", "error"])
def test_a_conversation_longer_than_a_sequence_is_never_cut_in_silence(settings, tmp_path, chat_tokenizer, too_long):
    long = {"messages": [_MESSAGES[0], {"role": "assistant", "content": "word " * 200}]}
    source, tokenizer = write(tmp_path / "data.jsonl", [FORMS["messages"], long]), chat_tokenizer()
    wanted = settings(source, tokenizer=str(tokenizer), sequence_length=128, too_long=too_long)
    if too_long == "error":
        with pytest.raises(DataError, match=r"record 2 .*data.jsonl: a conversation has .* tokens, more than prepare"):
            prepare(wanted, progress=False)
        return
    report = prepare(wanted, progress=False)
    texts = learned_texts(tmp_path / "output", tokenizer)
    if too_long == "drop":
        assert (len(texts), report.bad["too_long"].count) == (1, 1)
    else:
        assert report.bad["too_long_and_split"].first == [f"{source}:2"]
        assert "".join(text for text, _ in texts).count("word") == 200


def test_what_is_no_conversation_is_counted_by_kind(settings, tmp_path, chat_tokenizer):
    records = [
        FORMS["messages"],
        {"messages": [_MESSAGES[0]]},
        {"messages": "hello"},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, _MESSAGES[1]]},
        {"other": 1},
        {"messages": [{"role": "narrator", "content": "Once."}, *_MESSAGES]},
        {"messages": [{"role": "user", "content": " Say it. "}, _MESSAGES[1]]},
    ]
    source = write(tmp_path / "data.jsonl", records)
    tokenizer = chat_tokenizer(
        MARKED["tools"].replace("message.content + '<|im_end|>", "message.content|trim + '<|im_end|>")
    )
    report = prepare(settings(source, tokenizer=str(tokenizer), sequence_length=128), progress=False)
    assert {kind: items.first for kind, items in report.bad.items()} == {
        "no_answer": [f"{source}:2"],
        "malformed_conversation": [f"{source}:3"],
        "not_text": [f"{source}:4"],
        "missing_column": [f"{source}:5"],
        "message_left_out_by_template": [f"{source}:6"],
        "trimmed_message": [f"{source}:7"],
    }
    assert report.documents == 2


def test_a_template_whose_answers_cannot_be_told_is_refused_with_a_remedy(settings, tmp_path, chat_tokenizer):
    counted = "{{ messages | length }}{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    source = write(tmp_path / "data.jsonl", [CONVERSATIONS["several turns"]])
    wanted = settings(source, tokenizer=str(chat_tokenizer(counted)), sequence_length=128)
    with pytest.raises(DataError, match="cannot be told from this chat template .* mark it by {% generation %}"):
        prepare(wanted, progress=False)


MISPLACED = {
    "in a variable": "{% set x %}{% generation %}{{ messages[1].content }}{% endgeneration %}{% endset %}"
    "{{ messages[0].content }}{{ x }}",
    "by a macro": "{% macro say(m) %}A:{% generation %}{{ m }}{% endgeneration %}{% endmacro %}"
    "{{ messages[0].content }}{{ say(messages[1].content) }}",
    "by a filter": "{% filter upper %}{% generation %}{{ messages[1].content }}{% endgeneration %}{% endfilter %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "on the question": "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ messages[1].content }}!",
}


@pytest.mark.parametrize("kind", MISPLACED)
def test_a_mark_that_is_not_where_the_answer_is_is_refused(settings, tmp_path, chat_tokenizer, kind):
    source = write(tmp_path / "data.jsonl", [FORMS["messages"]])
    wanted = settings(source, tokenizer=str(chat_tokenizer(MISPLACED[kind])), sequence_length=128)
    with pytest.raises(DataError, match="cannot be told from this chat template"):
        prepare(wanted, progress=False)


def test_values_that_conversations_must_not_have_are_counted(settings, tmp_path, chat_tokenizer):
    question, answer = _MESSAGES
    wrong = {
        "malformed_conversation": [
            *({"messages": [question, answer | {"weight": value}]} for value in (0.5, "0", [0], float("nan"), 2)),
            {"messages": [question, answer | {"train": "false"}]},
            {"messages": [question, answer | {"content": [{"type": "text", "text": 5}]}]},
            {"messages": _MESSAGES, "tools": "[" * 100_000},
            {"conversations": [{"from": "human", "value": "Say."}, {"from": "function_call", "value": "[" * 100_000}]},
        ],
        "invalid_utf8": [{"messages": [question, answer | {"content": "a\ud800b"}]}],
    }
    source = write(
        tmp_path / "data.jsonl", [FORMS["messages"], *(record for kind in wrong.values() for record in kind)]
    )
    report = prepare(settings(source, tokenizer=str(chat_tokenizer()), sequence_length=128), progress=False)
    assert {kind: items.count for kind, items in report.bad.items()} == {
        kind: len(all_) for kind, all_ in wrong.items()
    }
    assert report.documents == 1


def test_characters_that_a_tokenizer_drops_from_a_conversation_are_counted(settings, tmp_path, chat_tokenizer):
    tokenizer = chat_tokenizer()
    path = tokenizer / "tokenizer.json"
    document = json.loads(path.read_text())
    document["normalizer"] = {"type": "Replace", "pattern": {"String": "\u00e9"}, "content": ""}
    alphabet = [token for token in document["model"]["vocab"] if len(token) == 1 and ord(token) > 255]
    document["model"]["vocab"].pop(alphabet[-1])  # so that not every byte has a token
    document["model"]["merges"] = []
    document["model"]["vocab"] = {token: n for n, token in enumerate(document["model"]["vocab"])}
    path.write_text(json.dumps(document))
    record = {"messages": [_MESSAGES[0], {"role": "assistant", "content": "Caf\u00e9."}]}
    source = write(tmp_path / "data.jsonl", [record])
    report = prepare(settings(source, tokenizer=str(tokenizer), sequence_length=128), progress=False)
    assert report.bad["unknown_characters"].count == 1


def test_a_template_that_is_no_ordinary_file_is_refused_and_not_waited_for(settings, tmp_path, chat_tokenizer):
    import os

    os.mkfifo(tmp_path / "pipe")
    source = write(tmp_path / "data.jsonl", [FORMS["messages"]])
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        wanted = settings(source, tokenizer=str(chat_tokenizer(name=f"for {path.name}")), chat_template=path)
        with pytest.raises(DataError, match="is not a regular file|cannot be read"):
            prepare(wanted, progress=False)


HOSTILE = {
    "forever": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "within 1 s"),
    "memory": ("{% set s = namespace(t='x') %}{% for a in range(60) %}{% set s.t = s.t ~ s.t %}{% endfor %}", "memory"),
    "escape": ("{{ messages.__class__.__mro__ }}", "sandbox forbids"),
    "power": ("{{ 9 ** 999999999 }}", "sandbox forbids"),
    "size": ("{% for a in range(99999) %}{{ 'x' * 100 }}{% endfor %}", "characters of a conversation of"),
    "syntax": ("{% if %}", "cannot be compiled"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_template_is_an_error_that_names_it(settings, tmp_path, chat_tokenizer, attack, monkeypatch):
    from moescale.data.prepare.chat import render_process

    limits = {"seconds": 1.0 if attack == "forever" else 3.0, "memory_bytes": 1 << 28}
    monkeypatch.setattr(render_process.RenderOptions.__init__, "__kwdefaults__", limits)
    template, message = HOSTILE[attack]
    whole = template + "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    source = write(tmp_path / "data.jsonl", [FORMS["messages"]])
    wanted = settings(source, tokenizer=str(chat_tokenizer(whole)), sequence_length=128)
    with pytest.raises(DataError, match=f"chat_template.jinja: .*{message}"):
        prepare(wanted, progress=False)


def test_a_date_is_fixed_when_the_corpus_is_made(settings, tmp_path, chat_tokenizer):
    source = write(tmp_path / "data.jsonl", [CONVERSATIONS["system"]])
    tokenizer = chat_tokenizer(MARKED["headers and a date"])
    wanted = {"source": source, "tokenizer": str(tokenizer), "sequence_length": 256}
    prepare(settings(**wanted, template_date="2024-02-01"), progress=False)
    assert "Today: 01 Feb 2024" in learned_texts(tmp_path / "output", tokenizer)[0][0]
    assert prepare(settings(**wanted), progress=False).unchanged
    with pytest.raises(DataError, match="template_date was '2024-02-01' and is now '2025-02-01'"):
        prepare(settings(**wanted, template_date="2025-02-01"), progress=False)


@pytest.mark.parametrize("too_long", ["drop", "split"])
def test_a_conversation_is_held_out_whole_and_in_one_split_only(settings, tmp_path, chat_tokenizer, too_long):
    """Also where it is cut into several sequences: every part says which conversation it is of."""
    records = [{"prompt": f"Say {n}.", "completion": f"<{n:03d}> " * (60 if n % 5 == 0 else 3)} for n in range(100)]
    source, tokenizer = write(tmp_path / "data.jsonl", records), chat_tokenizer()
    found = []
    for seed in (0, 0, 1):
        output = tmp_path / f"output{len(found)}"
        wanted = settings(
            source,
            tokenizer=str(tokenizer),
            sequence_length=128,
            output=output,
            too_long=too_long,
            validation_fraction=0.2,
            seed=seed,
        )
        prepare(wanted, progress=False)
        found.append([mentioned(output, tokenizer, split) for split in ("train", "validation")])
    train, held_out = found[0]
    kept = {n for n in range(100) if too_long == "split" or n % 5}
    assert train | held_out == kept and not train & held_out
    assert 8 <= len(held_out) <= 32
    assert found[0] == found[1] and found[0] != found[2]


def mentioned(output: Path, tokenizer: Path, split: str) -> set[int]:
    """The numbers in angle brackets in a split."""
    from tokenizers import Tokenizer

    decode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode
    corpus = open_corpus(output, split)
    texts = [decode(corpus.sequence(index).tokens.tolist()) for index in range(corpus.num_sequences)]
    return {int(number) for text in texts for number in re.findall(r"<(\d{3})>", text)}


def test_workers_and_validation_make_the_same_bytes(settings, tmp_path, chat_tokenizer):
    records = [{"prompt": f"Say {n}.", "completion": "It. " * (n % 17)} for n in range(1, 400) if n % 17]
    source, tokenizer = write(tmp_path / "data.jsonl", records), str(chat_tokenizer())
    found = []
    for number in (1, 2):
        output = tmp_path / f"output{number}"
        wanted = settings(
            source, tokenizer=tokenizer, sequence_length=256, output=output, num_workers=number, validation_fraction=0.1
        )
        report = prepare(wanted, progress=False)
        found.append([open_corpus(output, split).fingerprint for split in ("train", "validation")])
        assert report.documents == len(records)
    assert found[0] == found[1]
