"""Records to conversations: the forms in which people keep them, as messages of one form."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


class RecordFault(Exception):
    """A record is not a conversation; has the kind under which it is counted, and details for the user."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages, and which of them may be learned: answers of the assistant that the record does not exempt."""

    messages: list[Message]
    learned: list[bool]
    tools: list[Any] | None
    variables: dict[str, Any]
    """Other variables of the template, such as ``enable_thinking``."""


def form_of(columns: Mapping[str, Any]) -> str | None:
    """Return the form of a record with these columns, or None if it is not a conversation."""
    return next((name for name, (needed, _) in _FORMS.items() if all(column in columns for column in needed)), None)


def documents_line(text_column: str | None, other_form: str | None = None) -> str:
    """Say what records are taken for: conversations where ``text_column`` is None, else the texts in it.

    ``other_form`` is the form of the conversations that they hold, too, and that are not read.
    """
    if text_column is None:
        return "records are conversations"
    both = f"; they hold conversations ({other_form}), too: --format chat reads these" if other_form else ""
    return f"records are plain text, of the field '{text_column}'{both}"


def known_forms() -> str:
    """Return the columns that make a conversation, for messages."""
    return "; ".join(" and ".join(f"'{column}'" for column in needed) for needed, _ in _FORMS.values())


def conversation_of(record: Mapping[str, Any]) -> Conversation:
    """Read one record.

    Raises:
        RecordFault: it is not a conversation.
    """
    form = form_of(record)
    if form is None:
        raise RecordFault("missing_column", _without_conversation(record))
    messages, is_learned = _FORMS[form][1](record)
    if not messages:
        needed = " and ".join(f"'{column}'" for column in _FORMS[form][0])
        raise RecordFault(
            "empty_conversation", f"{needed} must hold a question and an answer at least; remove the record"
        )
    return Conversation(
        messages=messages,
        learned=is_learned,
        tools=_tools_of(record),
        variables=_object(record.get("chat_template_kwargs"), "chat_template_kwargs"),
    )


def _without_conversation(record: Mapping[str, Any]) -> str:
    names = [str(name)[:40] for name in list(record)[:12]]
    text = "; --format text learns 'text' as it is" if "text" in record else ""
    return (
        f"a record has the fields {', '.join(map(repr, names)) or 'none'}, and a conversation one of these: "
        f"{known_forms()}; rename or convert them{text}"
    )


def _messages_form(record: Mapping[str, Any]) -> tuple[list[Message], list[bool]]:
    return _checked(record["messages"], "messages")


def _sharegpt_form(record: Mapping[str, Any]) -> tuple[list[Message], list[bool]]:
    messages, learned = _checked(record["conversations"], "conversations")
    return [*_system(record), *messages], [*([False] * len(_system(record))), *learned]


def _completion_form(record: Mapping[str, Any]) -> tuple[list[Message], list[bool]]:
    """A prompt is context, whatever roles it has; the completion alone is learned."""
    prompt, completion = record["prompt"], record["completion"]
    before, _ = _checked(_as_messages(prompt, "user"), "prompt")
    after, learned = _checked(_as_messages(completion, "assistant"), "completion")
    before = [*_system(record), *before]
    return [*before, *after], [*([False] * len(before)), *learned]


def _instruction_form(record: Mapping[str, Any]) -> tuple[list[Message], list[bool]]:
    instruction, addition = record["instruction"], record.get("input") or ""
    for name, value in (("instruction", instruction), ("input", addition), ("output", record["output"])):
        if not isinstance(value, str):
            raise RecordFault("malformed_conversation", f"{name} ({type(value).__name__}) must be text")
    if record.get("history"):
        raise RecordFault("malformed_conversation", "history is not read; write such records as messages")
    question = f"{instruction}\n{addition}" if instruction and addition else instruction or addition
    return _checked(
        [*_system(record), {"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}],
        "output",
    )


_Reader = Callable[[Mapping[str, Any]], tuple[list[Message], list[bool]]]
_FORMS: dict[str, tuple[tuple[str, ...], _Reader]] = {
    "messages": (("messages",), _messages_form),
    "ShareGPT": (("conversations",), _sharegpt_form),
    "prompt and completion": (("prompt", "completion"), _completion_form),
    "instruction and output": (("instruction", "output"), _instruction_form),
}
COLUMNS = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "history",
    "system",
    "tools",
    "chat_template_kwargs",
)
"""All columns of a record that are read."""


def _system(record: Mapping[str, Any]) -> list[Message]:
    text = record.get("system")
    if text is not None and not isinstance(text, str):
        raise RecordFault("malformed_conversation", f"system ({type(text).__name__}) must be text")
    return [{"role": "system", "content": text}] if text else []


def _as_messages(value: Any, role: str) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _checked(messages: Any, column: str) -> tuple[list[Message], list[bool]]:
    if not isinstance(messages, list):
        raise RecordFault("malformed_conversation", f"{column} ({type(messages).__name__}) must be a list of messages")
    pairs = [_message(message, f"{column}[{number}]") for number, message in enumerate(messages)]
    return [message for message, _ in pairs], [is_learned for _, is_learned in pairs]


def _message(message: Any, where: str) -> tuple[Message, bool]:
    """Return a message as transformers gives it to templates, without keys that are null, and if it may be learned."""
    if not isinstance(message, dict):
        raise RecordFault("malformed_conversation", f"{where} ({type(message).__name__}) must be an object")
    if "from" in message and "role" not in message:
        message = _from_sharegpt(message, where)
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str):
        raise RecordFault("malformed_conversation", f"{where} has no role")
    _check_content(message.get("content"), where)
    is_learned = all(_flag(message.pop(name, True), f"{where}.{name}") for name in ("weight", "train"))
    return message, role == "assistant" and is_learned


def _flag(value: Any, where: str) -> bool:
    """Return whether a message may be learned; a share of the loss, which weights are elsewhere, there is not here."""
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return bool(value)
    raise RecordFault("malformed_conversation", f"{where} ({str(value)[:40]!r}) must be 0 or 1, or true or false")


def _from_sharegpt(message: Message, where: str) -> Message:
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    source, value = message["from"], message.get("value")
    if source == "function_call":
        try:
            call = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError) as error:
            raise RecordFault("malformed_conversation", f"{where}: a function_call must be JSON: {error}") from error
        calls = call if isinstance(call, list) else [call]
        if not all(isinstance(one, dict) for one in calls):
            raise RecordFault("malformed_conversation", f"{where}: a function_call must be an object")
        calls = [{"type": "function", "function": one} for one in calls]
        return {"role": "assistant", "content": "", "tool_calls": calls, **others}
    role = _SHAREGPT_ROLES.get(source) if isinstance(source, str) else None
    if role is None:
        raise RecordFault(
            "malformed_conversation", f"{where}.from ({source!r}) must be one of {', '.join(_SHAREGPT_ROLES)}"
        )
    return {"role": role, "content": value, **others}


def _check_content(content: Any, where: str) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise RecordFault("malformed_conversation", f"{where}.content ({type(content).__name__}) must be text")
    for part in content:
        if not isinstance(part, str) and (not isinstance(part, dict) or part.get("type") != "text"):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RecordFault("not_text", f"{where}.content has a part of type {kind!r}; only text can be learned")
        if isinstance(part, dict) and not isinstance(part.get("text", ""), str):
            raise RecordFault("malformed_conversation", f"{where}.content has a part whose text is none")


def _tools_of(record: Mapping[str, Any]) -> list[Any] | None:
    """Return the record's tools; a list without any counts as none, as everywhere tables are kept."""
    tools = record.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise RecordFault("malformed_conversation", f"tools must be JSON: {error}") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordFault("malformed_conversation", "tools must be a list of objects")
    return tools


def _object(value: Any, name: str) -> dict[str, Any]:
    if not value:
        return {}
    if not isinstance(value, dict):
        raise RecordFault("malformed_conversation", f"{name} ({type(value).__name__}) must be an object")
    return value
