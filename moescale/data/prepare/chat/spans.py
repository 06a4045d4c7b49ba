"""Finds the characters of a rendered conversation that the assistant wrote: by the template's marks, or by differences.

A template with ``generation`` blocks tells. For any other, an answer begins where the conversation before it, rendered
with its invitation to answer, ends. It ends after its content and whatever closes an answer: the text that follows a
placeholder put in its stead, when nothing comes after the answer. All of it is compared with the conversation's own
text, and a template for which that does not hold is refused: a span is never guessed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from moescale.data.prepare.chat.conversations import Conversation, Message, RecordFault
from moescale.data.prepare.chat.template import ChatTemplate, MisplacedMark

LOSS_ON = ("answers", "last-answer", "all")
TRIMMED = "trimmed_message"
REASONING = "reasoning_left_out_by_template"
DROPPED = "message_left_out_by_template"
_PLACEHOLDER = "qzwxanswerqzwx"
_UNDECIDED = "spans_undecided"
_REASONING_END = "</think>"


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """The text of a conversation, the ranges of characters to learn, and what the template left out of it."""

    text: str
    spans: list[tuple[int, int]]
    notes: list[tuple[str, str]] = field(default_factory=list)
    """Kind and detail of parts missing in the text although the conversation is kept."""


def render(template: ChatTemplate, conversation: Conversation, loss_on: str) -> Rendering:
    """Render a conversation.

    Args:
        loss_on: 'answers' of the assistant, the 'last-answer' alone, or 'all' of the text.

    Raises:
        RecordFault: the template leaves out a message, there is nothing to learn, or it cannot be told what.
    """
    messages, tools, variables = conversation.messages, conversation.tools, conversation.variables
    try:
        text, marked = template.render_marked(messages, tools, variables)
    except MisplacedMark as error:
        raise _undecided(str(error)) from error
    notes = _missing(text, messages)
    if loss_on == "all":
        return Rendering(text=text, spans=[(0, len(text))], notes=notes)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [number for number in answers if conversation.learned[number]]
    if loss_on == "last-answer":
        learned = learned[-1:]
    if not learned:
        raise RecordFault("no_answer", "it has no answer of the assistant to learn")
    if template.marks_answers:
        if learned == answers:
            spans = marked
        elif len(marked) == len(answers):
            spans = [span for number, span in zip(answers, marked, strict=True) if number in learned]
        else:
            raise _undecided(
                f"the template marks {len(marked)} parts of {len(answers)} answers, so which of them belong to those "
                "to learn is not known"
            )
        if spans and not any(_is_within(spans, text, messages[number]) for number in learned):
            raise _undecided("nothing that the template marks holds what an answer to learn says")
    else:
        spans = _by_differences(template, conversation, text, learned)
    spans = [(start, end) for start, end in spans if end > start]
    if not spans:
        raise RecordFault("no_answer", "nothing in its text is the assistant's")
    return Rendering(text=text, spans=spans, notes=notes)


def _is_within(spans: list[tuple[int, int]], text: str, message: Message) -> bool:
    """Return True if a message is in the marked text or has no content."""
    marked = "\n".join(text[start:end] for start, end in spans)
    return all(_missing_of(marked, content, message["role"]) != DROPPED for content in _contents(message))


def _by_differences(
    template: ChatTemplate, conversation: Conversation, text: str, learned: list[int]
) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for number in learned:
        start = _start_of(template, conversation, text, number)
        end = _end_of(template, conversation, text, number)
        if not (spans[-1][1] if spans else 0) <= start < end <= len(text):
            raise _undecided(f"message {number} seems to lie at {start} to {end} of {len(text)} characters")
        spans.append((start, end))
    return spans


def _start_of(template: ChatTemplate, conversation: Conversation, text: str, number: int) -> int:
    before = template.render(conversation.messages[:number], conversation.tools, conversation.variables, prompts=True)
    if not text.startswith(before):
        raise _undecided(
            f"the text before message {number} is another one when the conversation ends there: it goes apart at "
            f"character {_common(before, text)}"
        )
    return len(before)


def _end_of(template: ChatTemplate, conversation: Conversation, text: str, number: int) -> int:
    """Return where an answer's closing text ends, which is what follows it when it ends the conversation."""
    messages, tools, variables = conversation.messages, conversation.tools, conversation.variables
    if number == len(messages) - 1:
        return len(text)
    ended = template.render(messages[: number + 1], tools, variables)
    if text.startswith(ended):
        return len(ended)
    # A template may keep the reasoning of the last answer alone. Closing text and what follows do not depend on that.
    answer = messages[number] | {"content": _PLACEHOLDER}
    going_on = template.render([*messages[:number], answer, *messages[number + 1 :]], tools, variables)
    ended = template.render([*messages[:number], answer], tools, variables)
    if going_on.count(_PLACEHOLDER) != 1 or ended.count(_PLACEHOLDER) != 1:
        raise _undecided(f"the content of message {number} does not come up once in the text")
    rest = going_on.partition(_PLACEHOLDER)[2]
    closing = ended.partition(_PLACEHOLDER)[2]
    if not text.endswith(rest) or not rest.startswith(closing):
        raise _undecided(f"what closes message {number} is another text when the conversation goes on after it")
    return len(text) - len(rest) + len(closing)


def _undecided(reason: str) -> RecordFault:
    return RecordFault(_UNDECIDED, reason)


def _common(first: str, second: str) -> int:
    pairs = zip(first, second, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _missing(text: str, messages: list[Message]) -> list[tuple[str, str]]:
    """Return what the template left out and may leave out; raise for a message of which it does not write the content.

    Raises:
        RecordFault: a message is not in the text.
    """
    notes = []
    for number, message in enumerate(messages):
        for content in _contents(message):
            kind = _missing_of(text, content, message["role"])
            if kind == DROPPED:
                raise RecordFault(DROPPED, f"message {number} ({message['role']}) is not in the text as it was given")
            if kind is not None:
                notes.append((kind, f"message {number} ({message['role']})"))
        reasoning = next((message[key] for key in ("reasoning_content", "thinking", "reasoning") if key in message), "")
        if isinstance(reasoning, str) and reasoning.strip() not in text:
            notes.append((REASONING, f"message {number} ({message['role']})"))
        for call in message.get("tool_calls") or ():
            function = call.get("function", call) if isinstance(call, dict) else {}
            name = function.get("name") if isinstance(function, dict) else None
            if not isinstance(name, str) or name not in text:
                raise RecordFault(DROPPED, f"message {number}: the template does not write its call of {name!r}")
    return notes


def _contents(message: Message) -> list[str]:
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    return [part if isinstance(part, str) else part.get("text", "") for part in content or ()]


def _missing_of(text: str, content: str, role: str) -> str | None:
    if content in text:
        return None
    if content.strip() in text:
        return TRIMMED
    spelled = (json.dumps(content.strip(), ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True))
    if any(spelling in text for spelling in spelled):
        return None
    try:
        value = json.loads(content)  # a tool's result, perhaps written with other spaces
    except (ValueError, RecursionError):
        pass
    else:
        if json.dumps(value, ensure_ascii=False) in text:
            return None
    if role == "assistant" and _REASONING_END in content:
        answer = content.rpartition(_REASONING_END)[2].strip()
        return REASONING if answer in text else DROPPED
    return DROPPED
