"""Renders conversations in a separate process with limits of time and memory: a template is third-party code.

The sandbox keeps a template from the machine, but not from running forever or filling the memory. So records go to a
child, a JSON line each, and renderings come back the same way. A child that does not answer in time is ended, and the
record is an error that names the template.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import jinja2

from moescale.data.prepare.chat.conversations import RecordFault, conversation_of
from moescale.data.prepare.chat.spans import Rendering, render
from moescale.data.prepare.chat.template import ChatTemplate, TemplateSource
from moescale.errors import DataError

_SECONDS = 20.0
"""For one conversation; ordinary ones take milliseconds."""
_START_SECONDS = 120.0
_MEMORY_BYTES = 1 << 30
_MOST_EXPANSION = 64
_LEAST_TEXT_BYTES = 1 << 20
_PIECE_BYTES = 1 << 16
_START = "import sys; sys.path[:] = {path!r}; from moescale.data.prepare.chat.render_process import serve; serve()"


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """Options of a rendering process; ``date`` is the current date for templates, in ISO form."""

    source: TemplateSource
    loss_on: str
    date: str | None
    seconds: float = _SECONDS
    memory_bytes: int = _MEMORY_BYTES


class Renderer:
    """The parent's end of a rendering process, which starts with the first record."""

    def __init__(self, options: RenderOptions) -> None:
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._received = b""

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()
            process.wait()

    def __call__(self, record: Any) -> Rendering | RecordFault:
        """Render a record.

        Raises:
            DataError: the template cannot be compiled, or takes more time or memory than it may.
        """
        if self._process is None:
            self._start()
        answer = self._ask(json.dumps(record), self._options.seconds)
        if "error" in answer:
            raise DataError(answer["error"])
        if "fault" in answer:
            return RecordFault(*answer["fault"])
        spans = [(start, end) for start, end in answer["spans"]]
        return Rendering(text=answer["text"], spans=spans, notes=[(kind, detail) for kind, detail in answer["notes"]])

    def _start(self) -> None:
        self._received = b""
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._ask(json.dumps(asdict(self._options)), _START_SECONDS)

    def _ask(self, line: str, seconds: float) -> dict[str, Any]:
        assert self._process is not None and self._process.stdin is not None
        path = self._options.source.path
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
            return json.loads(self._line(time.monotonic() + seconds))
        except TimeoutError:
            self.close()
            raise DataError(
                f"{path}: the chat template has not rendered a conversation within {seconds:g} s; it must end, so "
                "give another one as prepare.chat_template"
            ) from None
        except (BrokenPipeError, EOFError):
            self.close()
            raise DataError(
                f"{path}: the chat template ended the process that rendered it; give another one as "
                "prepare.chat_template"
            ) from None

    def _line(self, deadline: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        pieces = [self._received]
        while b"\n" not in pieces[-1]:
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            piece = os.read(descriptor, _PIECE_BYTES)
            if not piece:
                raise EOFError
            pieces.append(piece)
        line, _, self._received = b"".join(pieces).partition(b"\n")
        return line


def serve() -> None:
    """Answer requests from standard input until it ends: the main loop of the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    lines: Iterator[bytes] = iter(sys.stdin.buffer.readline, b"")
    values = json.loads(next(lines))
    options = RenderOptions(**(values | {"source": TemplateSource(**values["source"])}))
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    most = options.memory_bytes if limits[1] == resource.RLIM_INFINITY else min(options.memory_bytes, limits[1])
    resource.setrlimit(resource.RLIMIT_DATA, (most, limits[1]))
    _send({})
    templates: dict[str, ChatTemplate] = {}
    for line in lines:
        try:
            answer = _answer(line, templates, options)
        except MemoryError:
            answer = {"error": f"{options.source.path}: the chat template takes more than {most:,} bytes of memory"}
        except DataError as error:
            answer = {"error": str(error)}
        _send(answer)


def _send(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


def _answer(line: bytes, templates: dict[str, ChatTemplate], options: RenderOptions) -> dict[str, Any]:
    try:
        conversation = conversation_of(json.loads(line))
        template = _template_for(conversation.tools, templates, options)
        rendering = render(template, conversation, options.loss_on)
    except RecordFault as fault:
        return {"fault": [fault.kind, fault.detail]}
    except MemoryError:
        raise
    except DataError:
        raise
    except jinja2.exceptions.SecurityError as error:
        raise DataError(
            f"{options.source.path}: the chat template does what its sandbox forbids: {error}; give another one as "
            "prepare.chat_template"
        ) from error
    except Exception as error:  # of any type, from a template that does not support the conversation
        return {"fault": ["refused_by_template", f"{type(error).__name__}: {error}"[:500]]}
    if len(rendering.text) > max(_LEAST_TEXT_BYTES, _MOST_EXPANSION * len(line)):
        raise DataError(
            f"{options.source.path}: the chat template makes {len(rendering.text):,} characters of a conversation of "
            f"{len(line):,} bytes; give another one as prepare.chat_template"
        )
    return asdict(rendering)


def _template_for(
    tools: Sequence[Any] | None, templates: dict[str, ChatTemplate], options: RenderOptions
) -> ChatTemplate:
    source = options.source
    name = "tool_use" if tools is not None and "tool_use" in source.templates else "default"
    if name not in source.templates:
        raise DataError(
            f"{source.path}: there is no chat template named 'default' (there are {', '.join(source.templates)}); give "
            "the file of one as prepare.chat_template"
        )
    if name not in templates:
        templates[name] = ChatTemplate(
            source.templates[name], path=source.path, variables=source.variables, date=options.date
        )
    return templates[name]
