"""The strict reader: whatever a file holds, either a record that keeps every rule, or an error that names the rule."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

import moescale
from moescale.errors import CheckpointError, DataError
from moescale.records import (
    MAX_DEPTH,
    Count,
    FileKind,
    FileName,
    Length,
    Matches,
    Range,
    RelativePath,
    build,
    parse_json,
    parse_toml,
    read_json,
    read_json_lines,
    read_json_object,
    read_toml,
)

KIND = FileKind(noun="a record", error=DataError, remedy="make it again", max_bytes=10_000)


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: Count
    name: FileName = "plain"


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    rate: Annotated[float, Range(above=0, most=1)] = 0.5
    kind: Literal["a", "b", 1] = "a"
    bounds: tuple[int, int] = (0, 1)
    names: Annotated[tuple[str, ...], Length(most=2)] = ()
    files: dict[RelativePath, Inner | None] | None = None
    mode: Literal["none"] | tuple[str, ...] = "none"
    code: Annotated[str, Matches("[a-z]+", "lower-case letters")] = "x"
    flag: bool = False
    free: Any = None


def outer(**changes):
    return build(Outer, {"inner": {"size": 1}} | changes, "file.json", KIND)


def test_a_record_has_the_types_of_its_annotations():
    record = outer(
        rate=1, bounds=[2, 3], names=["a"], files={"w/a": {"size": 2}, "b": None}, mode=["x"], free={"a": [1]}
    )
    assert record == Outer(
        inner=Inner(size=1),
        rate=1.0,
        bounds=(2, 3),
        names=("a",),
        files={"w/a": Inner(size=2), "b": None},
        mode=("x",),
        free={"a": [1]},
    )
    assert isinstance(record.rate, float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner": []}, "inner must be an object, not list"),
        ({"inner": {}}, "inner.size is missing"),
        ({"inner": {"size": 1, "nane": "x"}}, r"inner.nane is not a field of a record; did you mean 'name'\?"),
        ({"inner": {"size": -1}}, r"inner.size \(-1\) must be at least 0"),
        ({"inner": {"size": 1.0}}, r"inner.size \(1.0\) must be of type int"),
        ({"inner": {"size": True}}, r"inner.size \(True\) must be of type int"),
        ({"inner": {"size": None}}, r"inner.size \(None\) must be of type int"),
        ({"inner": {"size": 2**63}}, r"inner.size \(\d+\) must be a 64-bit integer"),
        ({"rate": 0}, r"rate \(0\) must be positive"),
        ({"rate": float("inf")}, r"rate \(inf\) must be a finite number"),
        ({"rate": 10**400}, r"rate \(an integer of 1329 bits\) must be a finite number"),
        ({"rate": "1"}, r"rate \('1'\) must be of type float"),
        ({"kind": True}, r"kind \(True\) must be one of a, b, 1"),
        ({"kind": {}}, r"kind \(a dict\) must be one of"),
        ({"bounds": [1]}, "bounds must have 2 elements, not 1"),
        ({"bounds": [1, "2"]}, r"bounds\[1\] \('2'\) must be of type int"),
        ({"names": ["a", "b", "c"]}, r"names \(a list\) must have at most 2 elements|names .* must have at most 2"),
        ({"names": "ab"}, r"names \('ab'\) must be of type tuple"),
        ({"files": {"../a": None}}, r"files: the name \('../a'\) must be a path below the file's folder"),
        ({"files": {"a": 1}}, "files.a must be an object, not int"),
        ({"mode": ["x", 1]}, r"mode\[1\] \(1\) must be of type str"),
        ({"mode": "some"}, r"mode \('some'\) must be one of none"),
        ({"code": "A"}, r"code \('A'\) must be lower-case letters"),
        ({"flag": 1}, r"flag \(1\) must be of type bool"),
        ({"free": [{"a": float("nan")}]}, r"free\[0\].a \(nan\) must be a finite number"),
        ({"free": ["\ud800"]}, r"free\[0\] \('.ud800'\) must be text"),
        ({"free": "x" * 500 + "\x1b", "flag": 1}, "flag"),
    ],
)
def test_a_broken_rule_is_named_with_file_field_and_value(changes, message):
    with pytest.raises(DataError, match=f"^file.json: {message}"):
        outer(**changes)


def test_values_of_any_length_are_shown_short_and_printable():
    with pytest.raises(DataError) as caught:
        outer(code="\x1b[31m" + "y" * 10_000)
    assert len(str(caught.value)) < 250
    assert str(caught.value).isprintable()


DEEP = MAX_DEPTH + 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", r"is not JSON \(.*line 1 column 2"),
        (b'{"a": 1} x', "is not JSON"),
        (b'{"a": 1, "a": 2}', "has the key 'a' twice in one object; make it again"),
        (b'{"' + b"k" * 1001 + b'": 1}', "has a key of 1001 characters"),
        (b'{"a": NaN}', r"a \(nan\) must be a finite number"),
        (b'{"a": [1, -Infinity]}', r"a\[1\] \(-inf\) must be a finite number"),
        (b'{"a": 1e999}', r"a \(inf\) must be a finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"a \(a number of 5000 digits\) must be a finite number"),
        (b'{"a": -' + b"9" * 350 + b"}", r"a \(an integer of 1163 bits\) must be a finite number"),
        (b"[" * 5000, "has more than 32 objects and lists in one another"),
        (b'{"a":' * DEEP + b"1" + b"}" * DEEP, "has more than 32 objects and lists in one another"),
        (b'{"\\ud800": 1}', ".* must be text: it has half of a surrogate pair"),
        (b'{"a": "\\uDC00x"}', r"a \(.*\) must be text"),
        (b'"\xff"', r"is not UTF-8 text \(byte 1: invalid start byte\); save it as UTF-8"),
        ("{}".encode("utf-16"), "is not UTF-8 text"),
        (b"\x00" * 100, "is not JSON"),
        (b" " * 10_001, "has more than 10,000 bytes, too many for a record"),
    ],
)
def test_a_damaged_json_file_is_refused(tmp_path, content, message):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"file.json: {message}"):
        read_json(path, KIND)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = ", "is not TOML"),
        (b"a = 1\na = 2", "is not TOML"),
        (b"a = nan", r"a \(nan\) must be a finite number"),
        (b"a = 0x" + b"f" * 20_00, r"a \(an integer of 8000 bits\) must be a finite number"),
        (b"a = " + b"9" * 5000, "is not TOML"),
        (b"a = " + b"[" * 4000, "is not TOML|.*more than 32"),
        (b"a = " + b"[" * DEEP + b"]" * DEEP, ".*more than 32"),
        (b"a = 9999-99-99", "is not TOML"),
        (b'a = "\xff"', "is not UTF-8"),
    ],
)
def test_a_damaged_toml_file_is_refused(tmp_path, content, message):
    path = tmp_path / "file.toml"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"file.toml: {message}"):
        read_toml(path, KIND)


def test_a_byte_order_mark_is_read_over(tmp_path):
    (tmp_path / "a").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    (tmp_path / "b").write_bytes(b"\xef\xbb\xbfa = 1")
    assert read_json(tmp_path / "a", KIND) == read_toml(tmp_path / "b", KIND) == {"a": 1}
    assert parse_json("\ufeff[]", "x", KIND) == []
    assert parse_toml("\ufeffa = 1", "x", KIND) == {"a": 1}


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path / "pipe", "is not a regular file"),
        (tmp_path, "is not a regular file|is a directory|Is a directory"),
        (tmp_path / "none", "none: missing"),
        (tmp_path / "pipe" / "x", "x: missing"),
        (tmp_path / "a\0b", "cannot be read"),
        (tmp_path / ("a" * 300), "cannot be read"),
    ]:
        with pytest.raises(DataError, match=message):
            read_json(path, KIND)


def test_a_line_of_json_lines_is_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n\n{"a"\n')
    with pytest.raises(DataError, match="lines.jsonl:3: is not JSON"):
        list(read_json_lines(path, KIND))


def test_the_kind_decides_error_and_unknown_fields(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="must be a JSON object, not list"):
        read_json_object(path, FileKind(noun="an index", error=CheckpointError))
    kind = FileKind(noun="an index", ignores_unknown=True, whole_floats=True)
    assert build(Inner, {"size": 8e9, "other": 1}, "x", kind) == Inner(size=8_000_000_000)


def test_reading_records_imports_nothing_heavy():
    code = (
        "import sys, moescale.records; print([m for m in ('torch', 'numpy', 'cyclopts', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_long_documents_are_read_as_json_itself_reads_them():
    document = {"a": [{"b": [i, -i / 3, str(i), None, True, 2**62]} for i in range(2000)]}
    assert parse_json(json.dumps(document), "x", KIND) == document


def test_a_file_name_that_is_not_utf8_is_read_back():
    name = os.fsdecode(b"caf\xe9.txt")
    assert parse_json(json.dumps({"a": name}), "x", KIND) == {"a": name}


PACKAGE = Path(moescale.__file__).parent
PARSES_ITSELF = {
    "moescale/records/documents.py": "is the reader",
    "moescale/runtime/watchdog.py": "a rank's own beat from the rendezvous store",
    "moescale/runtime/checkpoint_writer.py": "its own document of a moment ago, in memory",
    "moescale/data/prepare/table_process.py": "what this process and its own child send each other",
    "moescale/planner/explain.py": "the plan it has just written, in memory",
    "moescale/data/prepare/chat/conversations.py": "a tool's call in a record of the user's: bad ones are counted",
    "moescale/data/prepare/chat/render_process.py": "what this process and its own child send each other",
    "moescale/data/prepare/chat/spans.py": "what a tool answered, to find it again in the rendered text",
    "moescale/data/prepare/sources.py": "whether the first line of the user's corpus has the columns of a conversation",
    "moescale/data/prepare/encode.py": "a line of the user's corpus: one that is not JSON is counted",
    "moescale/data/prepare/file_kinds.py": "whether a line of the user's corpus is a record",
    "moescale/data/prepare/record_files.py": "an array of the user's corpus",
    "moescale/data/prepare/word_table.py": "the tokenizer library's own serialisation, in memory",
}
PARSERS = {
    "json": {"load", "loads", "JSONDecoder"},
    "numpy": {"load", "fromfile", "loadtxt", "genfromtxt"},
    "torch": {"load"},
    **dict.fromkeys(("tomllib", "pickle", "marshal", "yaml", "configparser", "msgspec", "cyclopts.config.Toml"), {""}),
}
"""By module, what of it makes values of a file; "" is all of it."""


def parses(tree: ast.Module) -> bool:
    """Whether a module turns text or bytes into values by a parser other than those of ``records``."""
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for name in (alias.name for alias in node.names):
                if name in PARSERS.get(node.module, ()) or f"{node.module}.{name}" in PARSERS:
                    return True
                if "" in PARSERS.get(node.module, ()):
                    return True
    if any("" in PARSERS.get(module, ()) for module in modules.values()):
        return True
    used = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name))
    return any(node.attr in PARSERS.get(modules.get(node.value.id, ""), ()) for node in used)


def test_nothing_but_the_strict_reader_parses_files():
    """A new reader fails here until it goes through ``records``, or is listed with what it reads instead of a file."""
    found = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*.py")
        if parses(ast.parse(path.read_text()))
    }
    assert found == PARSES_ITSELF.keys()


def test_a_new_reader_would_be_found():
    for source in (
        "import json\njson.load(f)",
        "import json as j\nj.loads(s)",
        "from json import loads",
        "import tomllib",
    ):
        assert parses(ast.parse(source))
    assert not parses(ast.parse("from moescale.records import read_json\nread_json(p, k)"))
