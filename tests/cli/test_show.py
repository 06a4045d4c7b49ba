"""``moescale show`` prints what is learned, and nothing that a terminal acts on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from chat_templates import MARKED
from moescale import cli
from moescale.data.batch import read_batch
from moescale.data.corpus import NO_TARGET, open_corpus
from moescale.data.prepare import PrepareSettings, prepare

EVIL = "\x1b[31m\x07\u202e\x9b1m\r{+ x +}"
CONVERSATIONS = [
    [("user", "Say it."), ("assistant", "It, é漢字😀.")],
    [("user", EVIL), ("assistant", "One.\n\nTwo."), ("user", "More?"), ("assistant", f"No{EVIL}")],
]


@pytest.fixture(scope="module")
def chat_corpus(tmp_path_factory, model_folder) -> Path:
    """One sequence of two conversations and padding."""
    folder = tmp_path_factory.mktemp("show")
    tokenizer = shutil.copytree(model_folder, folder / "tokenizer")
    (tokenizer / "chat_template.jinja").write_text(MARKED["chatml"].replace("<|im_end|>", "<|end_of_text|>"))
    records = [[{"role": role, "content": text} for role, text in turns] for turns in CONVERSATIONS]
    source = folder / "chats.jsonl"
    source.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in records))
    prepare(
        PrepareSettings(
            source=(str(source),),
            tokenizer=str(tokenizer),
            sequence_length=512,
            output=folder / "corpus",
            num_workers=1,
        ),
        progress=False,
    )
    return folder / "corpus"


@pytest.fixture
def show(capsys):
    """Run the command and return its output, or the error it ends with."""

    def run(*arguments: object, status: int = 0) -> str:
        with pytest.raises(SystemExit) as caught:
            cli.main(["show", *map(str, arguments)])
        assert (caught.value.code or 0) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return run


def test_what_is_learned_is_marked_and_special_tokens_are_visible(show, chat_corpus):
    lines = show(chat_corpus).splitlines()
    answer = lines.index("| <|im_start|>assistant↵")
    assert lines[answer + 1] == "| {+It, é漢字😀.<|end_of_text|>↵+}"
    assert lines[lines.index("| {+One.↵") + 1 :][:2] == ["| ↵", "| Two.<|end_of_text|>↵+}"]
    assert lines[0].startswith("sequence 0: 512 tokens, learned: ")
    corpus = open_corpus(chat_corpus)
    num_padding = corpus.sequence_length - int(np.flatnonzero(corpus.sequence(0).document_starts)[-1])
    assert lines[-2] == f"padding: {num_padding} tokens"
    learned = int((read_batch(corpus, np.array([0])).targets != NO_TARGET).sum())
    assert lines[-1] == (
        f"train: 1 sequences of 512 tokens: {learned / 512:.1%} learned, {num_padding / 512:.2%} padding, "
        "2.0 conversations per sequence"
    )


def test_learned_tokens_and_documents_are_those_that_training_sees(show, chat_corpus):
    [sequence] = json.loads(show(chat_corpus, "--json"))["sequences"]
    batch = read_batch(open_corpus(chat_corpus), np.array([0]))
    assert sequence["tokens"] == batch.tokens[0].tolist()
    assert sequence["num_learned"] == int((batch.targets != NO_TARGET).sum())
    texts = ["".join(run["text"] for run in document["runs"] if run["learned"]) for document in sequence["documents"]]
    assert texts == ["It, é漢字😀.<|end_of_text|>\n", f"One.\n\nTwo.<|end_of_text|>\nNo{EVIL}<|end_of_text|>\n"]


@pytest.mark.parametrize("colour", [True, False])
def test_no_text_acts_on_the_terminal_or_looks_like_a_mark(show, chat_corpus, monkeypatch, colour):
    if colour:
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
    printed = show(chat_corpus)
    ours = re.findall(r"\x1b\[[\d;]*m", printed)
    assert bool(ours) == colour
    rest = re.sub(r"\x1b\[(0|1|2|\d;4;32|3[24569]|1;4;32)m", "", printed)
    assert all(character.isprintable() or character == "\n" for character in rest)
    assert r"\x1b[31m\x07\u202e\x9b1m\r" in rest
    assert ("\x1b[32mIt, é漢字😀.\x1b[0m\x1b[1;4;32m<|end_of_text|>\x1b[0m\x1b[32m↵" in printed) == colour
    assert ("\x1b[35m<|end_of_text|>\x1b[0m" in printed) == colour
    assert (r"\{+ x \+}" in printed) != colour
    assert ("\x1b[2mpadding" in printed) == colour


def test_no_color_means_plain_marks_on_a_terminal_too(show, chat_corpus, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    printed = show(chat_corpus)
    assert "\x1b" not in printed
    assert "{+It" in printed


def test_of_plain_text_everything_is_learned(show, stdlib_corpus):
    printed = show(stdlib_corpus, "--first", 2)
    assert printed.count("learned: everything") == 2
    assert "{+" not in printed.replace(r"\{+", "")
    index = open_corpus(stdlib_corpus).num_sequences - 1
    assert f"sequence {index}: " in show(stdlib_corpus, "--sequence", index)


def test_without_the_tokenizer_ids_are_shown_and_why(show, chat_corpus, tmp_path):
    copy = shutil.copytree(chat_corpus, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    for name in ("/nowhere\x1b[31m\nsequence 7: all is well", "~nobody-of-that-name/x", "x/" * 3000, 5):
        manifest["made_from"]["tokenizer"] = name
        (copy / "manifest.json").write_text(json.dumps(manifest))
        printed = show(copy)
        first, second = printed.splitlines()[:2]
        assert first.startswith("ids instead of text: ") and "give it as --tokenizer" in first
        assert second.startswith("sequence 0: ")
        assert re.search(r"^\| [\d ]+ \{\+[\d ]+ 0 [\d ]+\+\}$", printed, re.MULTILINE)
        assert "\x1b" not in printed
    assert "{+It" in show(copy, "--tokenizer", chat_corpus.parent / "tokenizer")


def test_a_saved_dataset_shows_its_labels_and_padding(show, tmp_path):
    import datasets

    rows = {"input_ids": [[5, 6, 7, 0]], "labels": [[-100, 6, 9, -100]], "attention_mask": [[1, 1, 1, 0]]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    printed = show(tmp_path / "saved").splitlines()
    assert "learned: 2 tokens (1 as another token)" in printed[1]
    assert printed[3:5] == ["| 5 {+6 7+}", "padding: 1 tokens"]
    assert printed[-1].endswith("50.0% learned, 25.00% padding, document starts not recorded")


def test_the_first_token_of_a_document_follows_nothing(show, tmp_path):
    import datasets

    rows = {"input_ids": [[5, 6, 7, 8, 9]], "position_ids": [[0, 1, 0, 1, 2]]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    printed = show(tmp_path / "saved")
    assert "document 1: 2 tokens at 0, 1 learned\n| 5 6\ndocument 2: 3 tokens at 2, 2 learned\n| 7 8 9\n" in printed
    assert "60.0% learned, 0.00% padding, 2.0 documents per sequence" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--first", 0), "show.first (0) must be at least 1"),
        (("--sequence", 1), "show.sequence (1) must be from 0 to 0: .* has 1 sequences"),
        (("--first", 1, "--sequence", 0), "show.first (1) and show.sequence (0) exclude each other"),
        (("--split", "training"), "has no split 'training'; did you mean 'train'?"),
        (("--tokenizer", "./nowhere"), "tokenizer './nowhere' does not exist"),
    ],
)
def test_bad_input_is_an_error_that_names_it(show, chat_corpus, arguments, message):
    error = show(chat_corpus, *arguments, status=2)
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), error), error


def test_another_tokenizer_is_refused(show, chat_corpus, tmp_path):
    other = shutil.copytree(chat_corpus.parent / "tokenizer", tmp_path / "other")
    path = other / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    error = show(chat_corpus, "--tokenizer", other, status=2)
    assert re.search(r"is not the one that .*corpus was prepared with: its SHA-256 is \w+, the manifest says", error)


def test_an_id_outside_the_vocabulary_is_an_error(show, chat_corpus, tmp_path):
    copy = shutil.copytree(chat_corpus, tmp_path / "copy")
    tokens = np.fromfile(copy / "train-00000.bin", "<u2")
    tokens[3] = 60_000
    tokens.tofile(copy / "train-00000.bin")
    assert "sequence 0 has id 60000 at token 3, outside the corpus's vocabulary" in show(copy, status=2)
    assert "is not a folder" in show(tmp_path / "nothing", status=2)
