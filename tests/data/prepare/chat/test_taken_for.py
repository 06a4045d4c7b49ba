"""What records are taken for is said; a row that is no conversation is named with its rule and a remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from chat_templates import MARKED
from moescale.data.prepare import prepare
from moescale.errors import ConfigError, DataError

CHAT = {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It."}]}


def write(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def wanted(settings, tmp_path, model_folder):
    tokenizer = shutil.copytree(model_folder, tmp_path / "tokenizer")
    (tokenizer / "chat_template.jinja").write_text(MARKED["tools"])
    return lambda source, **fields: settings(source, **{"tokenizer": str(tokenizer), "sequence_length": 64} | fields)


@pytest.mark.parametrize(
    ("record", "fields", "said"),
    [
        (CHAT, {}, "records are conversations"),
        ({"text": "a b " * 40}, {}, "records are plain text, of the field 'text'"),
        (
            CHAT | {"text": "a b " * 40},
            {},
            "records are plain text, of the field 'text'; they hold conversations (messages), too: --format chat",
        ),
        (CHAT | {"text": "a b " * 40}, {"format": "chat"}, "records are conversations"),
    ],
)
def test_the_report_says_what_records_are_taken_for(record, fields, said, tmp_path, wanted):
    source = write(tmp_path / "data.jsonl", [record] * 4)
    again = wanted(source, **fields)
    for report in (prepare(again, progress=False), prepare(again, progress=False)):
        assert f"  {said}" in report.to_text()


@pytest.mark.parametrize(
    ("fields", "record", "message"),
    [
        ({"loss_on": "all"}, {"text": "a"}, r"prepare.loss_on \(all\) is about conversations, .* none of these: 'mess"),
        ({"too_long": "split"}, CHAT | {"text": "a"}, r"prepare.too_long .* have the field 'text', too; give --format"),
        ({"loss_on": "all", "format": "text"}, CHAT | {"text": "a"}, "drop --format text or --loss-on"),
        ({"text_column": "body", "format": "chat"}, CHAT, r"prepare.text_column \('body'\) means nothing for conv"),
    ],
)
def test_a_setting_of_the_other_kind_of_record_is_refused(fields, record, message, tmp_path, wanted):
    with pytest.raises(ConfigError, match=message):
        prepare(wanted(write(tmp_path / "data.jsonl", [record]), **fields), progress=False)


@pytest.mark.parametrize(
    ("record", "kind", "detail"),
    [
        ({"messages": []}, "empty_conversation", "'messages' must hold a question and an answer at least; remove"),
        ({"prompt": [], "completion": []}, "empty_conversation", "'prompt' and 'completion' must hold"),
        (
            {"text": "a"},
            "missing_column",
            "a record has the fields 'text', and a conversation one of these: 'messages'",
        ),
        ({"messages": CHAT["messages"] * 30}, "too_long", "raise --sequence-length, or give --too-long"),
    ],
)
def test_a_row_that_is_no_conversation_is_named_with_a_remedy(record, kind, detail, tmp_path, wanted):
    source = write(tmp_path / "data.jsonl", [CHAT, record])
    report = prepare(wanted(source, format="chat"), progress=False)
    assert report.bad[kind].first == [f"{source}:2"]
    assert detail in report.bad[kind].detail
    assert f"({source}:2): {report.bad[kind].detail}" in report.to_text()
    with pytest.raises(DataError, match=rf"data.jsonl:2: {kind.replace('_', ' ')} \(strict\): "):
        prepare(wanted(source, format="chat", strict=True, output=tmp_path / "other"), progress=False)


def test_a_conversation_read_as_text_is_named_as_one(tmp_path, wanted):
    source = write(tmp_path / "data.jsonl", [{"text": "a b " * 40}, CHAT])
    report = prepare(wanted(source), progress=False)
    assert "a conversation; --format chat reads it as one" in report.bad["missing_column"].detail
