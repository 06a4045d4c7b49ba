"""Texts, tokens and masks are those of transformers."""

from __future__ import annotations

import json
from datetime import datetime

import numpy as np
import pytest

from chat_templates import CONVERSATIONS, MARKED, UNMARKED, takes
from moescale.data.prepare.chat.conversations import conversation_of
from moescale.data.prepare.chat.encode import covered
from moescale.data.prepare.chat.spans import REASONING, render
from moescale.data.prepare.chat.template import ChatTemplate, find_template
from moescale.data.prepare.tokenizer import load_tokenizer

TOKENS = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "<s>"]
CASES = [(name, kind) for name in MARKED for kind in CONVERSATIONS if takes(name, kind)]


@pytest.fixture(scope="module")
def tokenizer(model_folder, tmp_path_factory):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(model_folder), bos_token="<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    return tokenizer


def our_template(tokenizer, folder, text: str) -> ChatTemplate:
    tokenizer.chat_template = text
    tokenizer.save_pretrained(folder)
    source = find_template(load_tokenizer(str(folder)).files, None)
    assert source.templates == {"default": text}
    today = datetime.now().date().isoformat()
    return ChatTemplate(text, path=source.path, variables=source.variables, date=today)


def our_tokens(tokenizer, rendering) -> tuple[list[int], list[int]]:
    encoding = tokenizer.backend_tokenizer.encode(rendering.text, add_special_tokens=False)
    return encoding.ids, covered(np.array(encoding.offsets), rendering.spans).astype(int).tolist()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_texts_and_masks_are_those_of_transformers(tokenizer, tmp_path, name, kind):
    record = CONVERSATIONS[kind]
    template = our_template(tokenizer, tmp_path, MARKED[name])
    arguments = {"conversation": record["messages"], "tools": record.get("tools")}
    theirs = tokenizer.apply_chat_template(**arguments, return_assistant_tokens_mask=True, return_dict=True)
    ours = render(template, conversation_of(record), "answers")
    assert ours.text == tokenizer.apply_chat_template(**arguments, tokenize=False)
    assert our_tokens(tokenizer, ours) == (theirs["input_ids"], theirs["assistant_masks"])
    assert 0 < sum(theirs["assistant_masks"]) < len(theirs["input_ids"])
    prompt = tokenizer.apply_chat_template(**arguments, tokenize=False, add_generation_prompt=True)
    assert prompt == template.render(conversation_of(record).messages, record.get("tools"), {}, prompts=True)


@pytest.mark.parametrize(
    ("name", "kind"), [case for case in CASES if case[0] not in ("brackets", "plain words", "json")]
)
def test_differences_find_what_marks_tell(tokenizer, tmp_path, name, kind):
    record = conversation_of(CONVERSATIONS[kind])
    marked = render(our_template(tokenizer, tmp_path, MARKED[name]), record, "answers")
    found = render(our_template(tokenizer, tmp_path, UNMARKED[name]), record, "answers")
    assert (found.text, found.spans, found.notes) == (marked.text, marked.spans, marked.notes)
    last = render(our_template(tokenizer, tmp_path, UNMARKED[name]), record, "last-answer")
    assert last.spans == marked.spans[-1:]


def test_a_template_that_keeps_the_reasoning_of_the_last_answer_alone_is_noted(tokenizer, tmp_path):
    record = conversation_of(CONVERSATIONS["reasoning"])
    rendering = render(our_template(tokenizer, tmp_path, UNMARKED["reasoning of the last answer"]), record, "answers")
    assert [kind for kind, _ in rendering.notes] == [REASONING]
    assert [rendering.text[start:end] for start, end in rendering.spans] == [
        "Four.\n\nIndeed: 漢字, é.<|im_end|>\n",
        "<think>\nOne more.\n</think>\n\nFive.<|im_end|>\n",
    ]


def test_a_template_may_be_one_of_several_by_name(tokenizer, tmp_path):
    tokenizer.chat_template = {"default": MARKED["chatml"], "tool_use": MARKED["tools"]}
    tokenizer.save_pretrained(tmp_path)
    assert find_template(load_tokenizer(str(tmp_path)).files, None).templates == tokenizer.chat_template
    (tmp_path / "chat_template.jinja").unlink()
    for file in (tmp_path / "additional_chat_templates").iterdir():
        file.unlink()
    (tmp_path / "additional_chat_templates").rmdir()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert find_template(load_tokenizer(str(tmp_path)).files, None).templates == {"default": "a", "tool_use": "b"}
