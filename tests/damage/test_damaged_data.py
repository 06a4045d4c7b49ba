"""Data, damaged: sources of `prepare`, what is written with checksums, and what libraries in other languages read.

Whatever the damage, `prepare` refuses the file by name or accounts for every document: by the format's own rules where
it has no checksum, and with the very tokens of the whole file where it has one. A change of a file that this package
wrote is always noticed. Libraries that a damaged file might crash run in a process of their own.
"""

from __future__ import annotations

import gzip
import json
import random
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from damages import BAD_VALUES, LIBRARIES, SOURCES, WITH_CHECKSUMS, damaged_bytes, places, replaced
from moescale.data.corpus import open_corpus
from moescale.data.corpus import verify as verify_corpus
from moescale.data.prepare import PrepareSettings, prepare
from moescale.data.prepare.report import PrepareReport
from moescale.errors import MoescaleError
from moescale.runtime.checkpoint import verify
from moescale.runtime.checkpoint_store import CheckpointStore
from moescale.runtime.checkpoint_writer import CheckpointWriter
from warm_start import run_warm

datasets = pytest.importorskip("datasets")
zstandard = pytest.importorskip("zstandard")

TEXTS = [f"{number} some text, and more é {number % 7} " * (1 + number % 9) for number in range(120)]
CHATS = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": f"answer {number}"}]
    for number, text in enumerate(TEXTS[:40])
]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
FEW, MANY = 25, 1000
BY_A_PROCESS = {FEW: 2, MANY: 150}
"""Of tables: each takes a second, for the process that reads it."""


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """What `prepare` made of a damaged source."""

    report: PrepareReport
    tokens: bytes
    content: bytes
    """Of the damaged file."""

    @property
    def num_bad(self) -> int:
        return sum(items.count for items in self.report.bad.values())


def whole_file(name: str) -> bytes:
    """A whole source, in the format that its name says."""
    import io

    import pyarrow
    from pyarrow import ipc, parquet

    table, packed = pyarrow.table({"messages": CHATS} if name.startswith("chat") else {"text": TEXTS}), io.BytesIO()
    if name.endswith(".parquet"):
        parquet.write_table(table, packed, write_page_checksum=True, row_group_size=30)
    elif name.endswith(".arrow"):
        with ipc.new_file(packed, table.schema) as writer:
            writer.write_table(table, max_chunksize=30)
    if packed.tell():
        return packed.getvalue()
    content = {
        "chat.jsonl": "".join(json.dumps({"messages": messages}) + "\n" for messages in CHATS),
        "chat.jinja": TEMPLATE,
        "a.txt": "\n".join(TEXTS),
        "long.txt": "\n".join(TEXTS),
        "a.jsonl": "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(TEXTS)),
        "a.json": json.dumps([{"id": number, "text": text} for number, text in enumerate(TEXTS)]),
        "a.csv": "id,text\n" + "".join(f'{number},"{text}"\n' for number, text in enumerate(TEXTS)),
    }[name.removesuffix(".gz").removesuffix(".zst")].encode()
    if name.endswith(".gz"):
        return gzip.compress(content, mtime=0)
    return zstandard.ZstdCompressor(write_checksum=True).compress(content) if name.endswith(".zst") else content


def same_tokens(accepted: Accepted, whole: Accepted) -> bool:
    return accepted.tokens == whole.tokens


def accounts_for_every_line(accepted: Accepted, _whole: Accepted) -> bool:
    def is_document(line: bytes) -> bool:
        try:
            text = json.loads(line.decode())["text"]
            return isinstance(text, str) and bool(text.encode())
        except (ValueError, KeyError, TypeError, RecursionError):
            return False

    lines = accepted.content.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n")
    good = sum(map(is_document, lines))
    return accepted.report.documents == good and accepted.num_bad == len(lines) - good


def is_valid_or_counted(accepted: Accepted, _whole: Accepted) -> bool:
    try:
        document = json.loads(accepted.content.decode("utf-8-sig"))
        good = sum(isinstance(item, dict) and bool(item.get("text")) for item in document)
        return good - accepted.num_bad <= accepted.report.documents <= len(document)
    except (ValueError, RecursionError, TypeError):
        return accepted.num_bad > 0


def accounts_for_every_conversation(accepted: Accepted, whole: Accepted) -> bool:
    """A damaged line may be several or none, and what is valid JSON may no longer be a conversation."""
    num_lines = len([line for line in accepted.content.removesuffix(b"\n").split(b"\n") if line])
    return accepted.report.documents + accepted.num_bad >= num_lines - 1


def is_accepted(accepted: Accepted, whole: Accepted) -> bool:
    """Another template is another template: every conversation is rendered by it, or counted."""
    return accepted.report.documents <= whole.report.documents <= accepted.report.documents + accepted.num_bad


def is_one_text(accepted: Accepted, _whole: Accepted) -> bool:
    accepted.content.decode()  # raises where it should have been refused or counted: nothing else is in this source
    return accepted.report.documents == 1 and b"\0" not in accepted.content[:8192]


def counts_at_least_what_it_read(accepted: Accepted, _whole: Accepted) -> bool:
    return accepted.report.documents > 0


RULES: dict[str, Callable[[Accepted, Accepted], bool]] = {
    "a.txt": is_one_text,
    "long.txt": is_one_text,
    "a.jsonl": accounts_for_every_line,
    "a.json": is_valid_or_counted,
    "a.csv": counts_at_least_what_it_read,
    "a.arrow": counts_at_least_what_it_read,
    "chat.arrow": counts_at_least_what_it_read,
    "chat.parquet": same_tokens,
    "chat.jsonl": accounts_for_every_conversation,
    "chat.jinja": is_accepted,
    **dict.fromkeys(("a.parquet", "a.txt.gz", "a.jsonl.gz", "a.json.zst", "a.csv.zst"), same_tokens),
}


def prepared(path: Path, tokenizer: Path, output: Path) -> Accepted | None:
    """What `prepare` makes of a file; None where it refuses it, by its name."""
    is_template, is_chat = path.suffix == ".jinja", path.name.startswith("chat")
    source, template = (path.with_name("source.jsonl"), path) if is_template else (path, path.with_name("template"))
    if is_template:
        source.write_bytes(whole_file("chat.jsonl"))
    elif is_chat:
        template.write_text(TEMPLATE)
    settings = PrepareSettings(
        source=(str(source),),
        tokenizer=str(tokenizer),
        sequence_length=128 if is_chat else 16,
        output=output,
        num_workers=1,
        chat_template=template if is_chat else None,
    )
    try:
        report = prepare(settings, progress=False)
    except MoescaleError as error:
        assert str(path) in str(error) and len(str(error)) < 4000, error
        return None
    tokens = b"".join(file.read_bytes() for file in sorted(output.glob("*.bin")))
    return Accepted(report=report, tokens=tokens, content=path.read_bytes())


def check_source(name: str, tokenizer: Path, folder: Path, number: int) -> None:
    generator, content = random.Random(f"{name} {number}"), whole_file(name)
    path = folder / name
    path.write_bytes(content)
    whole = prepared(path, tokenizer, folder / "whole")
    assert whole is not None and RULES[name](whole, whole)
    num_refused = 0
    for index in range(number):
        damaged = damaged_bytes(content, generator)
        path.write_bytes(damaged)
        accepted = prepared(path, tokenizer, folder / f"{index}")
        if accepted is None:
            num_refused += 1
        elif damaged != content:
            path.with_name("kept").write_bytes(damaged)
            assert RULES[name](accepted, whole), f"damage {index} is not noticed: {folder / 'kept'}"
    print(f"{name}: {num_refused} of {number} refused")


@pytest.fixture
def short_parts(monkeypatch):
    """Texts long enough to be read in parts are short."""
    monkeypatch.setattr("moescale.data.prepare.sources._LONG_DOCUMENT_BYTES", 1 << 13)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("number", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_a_damaged_source_is_refused_by_name_or_accounted_for(name, number, model_folder, tmp_path, request):
    if name == "long.txt":
        request.getfixturevalue("short_parts")
    by_a_process = name.startswith("chat") or name in ("a.parquet", "a.arrow")
    check_source(name, model_folder, tmp_path, BY_A_PROCESS[number] if by_a_process else number)


@pytest.fixture(scope="module")
def written(tmp_path_factory, model_folder) -> dict[str, tuple[Path, Callable[[], Any]]]:
    """Files written with a checksum, and what reads and verifies them."""
    folder = tmp_path_factory.mktemp("written")
    (folder / "a.jsonl").write_bytes(whole_file("a.jsonl"))
    settings = PrepareSettings(
        source=(str(folder / "a.jsonl"),),
        tokenizer=str(model_folder),
        sequence_length=16,
        output=folder / "corpus",
        document_boundaries=True,
        num_workers=1,
    )
    prepare(settings, progress=False)
    (folder / "chat.jsonl").write_bytes(whole_file("chat.jsonl"))
    assert prepared(folder / "chat.jsonl", model_folder, folder / "chats") is not None
    store = CheckpointStore(folder / "checkpoints", keep=1)
    checkpoint = CheckpointWriter(store).save(1, {}, {"a": torch.arange(300.0), "b": torch.ones(4, 5)})
    corpus = folder / "corpus"
    return {
        "train-00000.bin": (corpus / "train-00000.bin", lambda: verify_corpus(open_corpus(corpus))),
        "train-00000.starts": (corpus / "train-00000.starts", lambda: verify_corpus(open_corpus(corpus))),
        "train-00000.targets": (
            folder / "chats" / "train-00000.targets",
            lambda: verify_corpus(open_corpus(folder / "chats")),
        ),
        "tensors-00000-0000.safetensors": (
            checkpoint.path / "tensors-00000-0000.safetensors",
            lambda: verify(checkpoint),
        ),
    }


@pytest.mark.parametrize("name", WITH_CHECKSUMS)
@pytest.mark.parametrize("number", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_every_change_of_what_was_written_with_a_checksum_is_noticed(name, number, written):
    path, read = written[name]
    content, generator = path.read_bytes(), random.Random(f"{name} {number}")
    read()
    try:
        for _ in range(number):
            damaged = damaged_bytes(content, generator)
            path.write_bytes(damaged)
            if damaged != content:
                with pytest.raises(MoescaleError, match=path.name):
                    read()
    finally:
        path.write_bytes(content)


@pytest.fixture(scope="module")
def of_libraries(tmp_path_factory, adapter_folder, model_folder) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("libraries")
    (folder / "weights").mkdir()
    save_file({"a": torch.ones(3, 4), "b": torch.ones(5)}, folder / "weights" / "one.safetensors")
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 8})
    rows.save_to_disk(str(folder / "saved"))
    return {
        "weights.safetensors": folder / "weights" / "one.safetensors",
        "adapter_model.safetensors": adapter_folder / "adapter_model.safetensors",
        "tokenizer.json": model_folder / "tokenizer.json",
        "dataset.arrow": next((folder / "saved").glob("*.arrow")),
    }


CHILD = textwrap.dedent("""
    import sys
    from pathlib import Path
    from moescale.errors import MoescaleError

    def read(folder):
        if sys.argv[1] == "weights.safetensors":
            from moescale.convert.weight_files import read_headers

            read_headers(folder)
        elif sys.argv[1] == "adapter_model.safetensors":
            from moescale.convert.adapter_folder import read_adapter, read_adapter_settings
            from moescale.convert.hf_config import read_model_config

            config = read_model_config(folder)
            read_adapter(folder, config, read_adapter_settings(folder, config))
        elif sys.argv[1] == "tokenizer.json":
            from moescale.data.prepare.encode import Encoder
            from moescale.data.prepare.tokenizer import load_tokenizer

            made = load_tokenizer(str(folder))
            encoder = Encoder(
                tokenizer_json=made.tokenizer.to_str(),
                end_token_id=made.end_token_id,
                vocabulary_size=made.vocabulary_size,
                text_column="text",
                most_document_bytes=1 << 30,
            )
            encoder.tokens_of("def f(x): return x + 1  # é")
        else:
            from moescale.data.corpus.saved_dataset import open_saved_dataset

            corpus = open_saved_dataset(folder)
            corpus.vocabulary_size
            for index in range(corpus.num_sequences):
                corpus.sequence(index).tokens.sum()

    for folder in sorted(Path(sys.argv[2]).iterdir()):
        try:
            read(folder)
            print(folder.name, "accepted", flush=True)
        except MoescaleError:
            print(folder.name, "refused", flush=True)
""")


PREFIXES = ('"x"', '"\u0120"', '"/etc/passwd"', "0", "1", "4294967295")
"""Values that a library in another language would take for what it expects."""


def damaged_value(content: bytes, generator: random.Random) -> bytes:
    """A JSON document with one value replaced, one of the model's settings more often than one of its tokens."""
    document = json.loads(content)
    found = list(places(document))
    settings = [place for place in found if not place[0].startswith(("model.vocab.", "model.merges["))]
    _, keys = generator.choice(settings if generator.random() < 0.7 else found)
    return replaced(document, keys, generator.choice((*BAD_VALUES, *PREFIXES)))


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("number", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_damage_to_files_of_other_libraries_ends_no_process(name, number, of_libraries, tmp_path):
    path, generator = of_libraries[name], random.Random(f"{name} {number}")
    content = path.read_bytes()
    for index in range(number):
        copy = tmp_path / "copies" / f"{index:05d}"
        copy.mkdir(parents=True)
        for other in path.parent.iterdir():
            if other.is_file() and other != path:
                (copy / other.name).write_bytes(other.read_bytes())
        damaged = damaged_value if path.suffix == ".json" and index % 2 else damaged_bytes
        (copy / path.name).write_bytes(damaged(content, generator))
    (tmp_path / "child.py").write_text(CHILD)
    done = run_warm([name, tmp_path / "copies"], script=tmp_path / "child.py", timeout=900)
    num_read = len(done.stdout.splitlines())
    assert done.returncode == 0, f"after {num_read} of {number}, status {done.returncode}: {done.stderr[-2000:]}"
    assert num_read == number
    assert "refused" in done.stdout
