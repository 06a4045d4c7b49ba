"""Chat templates: finds them in a tokenizer's files, and renders them exactly as transformers does.

The settings of the Jinja environment are those that transformers documents for chat templates: blocks trimmed, an
immutable sandbox, loop controls, ``tojson`` without escaping of HTML, ``raise_exception``, ``strftime_now``, and the
``generation`` tag that marks what the assistant writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from moescale.errors import DataError
from moescale.records import FileKind, read_bytes, read_json_object

FILES = ("chat_template.jinja",)
MORE_FILES = "additional_chat_templates"
_TOKEN_VARIABLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CONFIG = FileKind(noun="a tokenizer's configuration", error=DataError, remedy="repair it, or fetch it again")
_TEMPLATE = FileKind(noun="a chat template", error=DataError, max_bytes=2**22, remedy="give a file of text")
_LARGEST_POWER = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TemplateSource:
    """The templates of a tokenizer and what they are rendered with; plain values, sent to the rendering process."""

    path: str
    templates: dict[str, str]
    """By name; 'default' is used, and 'tool_use' for a conversation with tools where there is one."""
    variables: dict[str, str]
    """Special tokens by name."""

    @property
    def uses_date(self) -> bool:
        return any("strftime_now" in template for template in self.templates.values())


def find_template(files: Mapping[str, Path], given: Path | None) -> TemplateSource:
    """Read the templates among a tokenizer's ``files``, or the one in the file ``given``.

    Raises:
        DataError: there is no template, or a file is damaged.
    """
    config_path = files.get("tokenizer_config.json")
    config = read_json_object(config_path, _CONFIG) if config_path is not None else {}
    variables = _variables(config, files)
    if given is not None:
        return TemplateSource(path=str(given), templates={"default": _read(given)}, variables=variables)
    path = files.get("chat_template.jinja")
    more = files["tokenizer.json"].parent / MORE_FILES
    if path is not None or more.is_dir():
        templates = {} if path is None else {"default": _read(path)}
        if more.is_dir():
            templates |= {file.stem: _read(file) for file in sorted(more.glob("*.jinja"))}
        return TemplateSource(path=str(path or more), templates=templates, variables=variables)
    value = config.get("chat_template")
    if isinstance(value, str):
        return TemplateSource(path=str(config_path), templates={"default": value}, variables=variables)
    if isinstance(value, list) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str)
        for one in value
    ):
        named = {one["name"]: one["template"] for one in value}
        return TemplateSource(path=str(config_path), templates=named, variables=variables)
    raise DataError(
        f"{files['tokenizer.json'].parent}: the tokenizer has no chat template (a base model's has none); give the "
        "folder of its instruct version as tokenizer, or a file with a template as prepare.chat_template"
    )


def _read(path: Path) -> str:
    try:
        return read_bytes(path, _TEMPLATE).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"chat template {path} cannot be read: {error}; give a file of UTF-8 text") from error


def _variables(config: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, str]:
    """Return the special tokens by name. An older file counts where the configuration lists no added tokens."""
    known = dict(config)
    if "added_tokens_decoder" not in config and "special_tokens_map.json" in files:
        known |= read_json_object(files["special_tokens_map.json"], _CONFIG)
    for name in ("model_specific_special_tokens", "extra_special_tokens"):
        if isinstance(config.get(name), dict):
            known |= config[name]
    found = {}
    for name, value in known.items():
        content = value.get("content") if isinstance(value, dict) else value
        if (name in _TOKEN_VARIABLES or name.endswith("_token")) and isinstance(content, str):
            found[name] = content
    return found


class MisplacedMark(Exception):
    """The position of the assistant's text in the rendered text is not known."""


class ChatTemplate:
    """A compiled template.

    Raises:
        DataError: it is not a template that can be compiled.
    """

    def __init__(self, text: str, *, path: str, variables: Mapping[str, str], date: str | None) -> None:
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        now = datetime.now() if date is None else datetime.fromisoformat(date)
        environment.globals |= {
            "raise_exception": _raise,
            "strftime_now": now.strftime,
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        self.marks_answers = bool(_GENERATION.search(text))
        self._variables = variables
        self._spans: list[tuple[int, int]] = []
        self._marked: list[str] = []
        self._blocks: list[str] = []
        environment.extend(mark_answer=self._mark)
        try:
            self._template = environment.from_string(text)
        except (jinja2.TemplateError, RecursionError, OverflowError, MemoryError) as error:
            raise DataError(
                f"{path}: the chat template cannot be compiled: {error or type(error).__name__}; repair it"
            ) from error

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        variables: Mapping[str, Any],
        *,
        prompts: bool = False,
    ) -> str:
        """Return the text of a conversation; with ``prompts`` with what invites the assistant to answer."""
        return self.render_marked(messages, tools, variables, prompts=prompts)[0]

    def render_marked(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        variables: Mapping[str, Any],
        *,
        prompts: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text and the ranges of characters that the template marks as the assistant's.

        Raises:
            MisplacedMark: what it marks does not become text where it is marked: it is kept in a variable first, made
                by a macro or changed by a filter.
        """
        self._spans, self._marked, self._blocks = [], [], []
        messages = [_with_reasoning(message) for message in messages]
        for block in self._template.generate(
            **(dict(self._variables) | dict(variables)),
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=prompts,
        ):
            self._blocks.append(block)
        text = "".join(self._blocks)
        for (start, end), marked in zip(self._spans, self._marked, strict=True):
            if text[start:end] != marked:
                raise MisplacedMark(f"the text marked {marked[:40]!r} is not where the template marks it")
        return text, self._spans

    def _mark(self, text: str) -> None:
        start = sum(map(len, self._blocks))
        self._spans.append((start, start + len(text)))
        self._marked.append(text)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Give a message's reasoning the names by which templates ask for it."""
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, which also refuses powers that would keep the machine busy or fill its memory."""

    intercepted_binops = frozenset({"**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if (
            not all(isinstance(value, int | float) for value in (left, right))
            or abs(right) > 64
            or abs(left) > (_LARGEST_POWER)
        ):
            raise jinja2.exceptions.SecurityError("a power of large numbers")
        return super().call_binop(context, operator, left, right)


class _Generation(jinja2.ext.Extension):
    """The ``generation`` tag, which encloses the assistant's text."""

    tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller: Any) -> str:
        text = caller()
        self.environment.mark_answer(text)  # type: ignore[attr-defined]
        return text


class _Dict:
    """``dict`` without access to the attributes of its type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """``namespace`` that takes no names beginning with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may name an attribute self
        self, *others = args
        values = dict(*others, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name!r} begins with an underscore")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)
