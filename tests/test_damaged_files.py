"""Every file the package reads, damaged: a record that keeps every rule, or an error for the user; never anything else.

Two kinds of damage. *Values*: every value of a document in turn is replaced by one of another type, size or depth; it
may be accepted only where the field is free or the value is as good as the one before. *Bytes*: bits flipped, bytes
cut, doubled and overwritten, seeded. Readers in other languages, which a damaged file might crash, run in a process of
their own.
"""

import contextlib
import copy
import io
import json
import random
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moescale import cli
from moescale.api import export
from moescale.convert.hf_config import read_model_config
from moescale.convert.weight_files import read_headers
from moescale.data.corpus import open_corpus
from moescale.data.corpus.manifest import read_manifest, read_source_files
from moescale.data.corpus.saved_dataset import open_saved_dataset, splits_of
from moescale.data.prepare.tokenizer import load_tokenizer
from moescale.errors import MoescaleError
from moescale.kernels.experts import launch_config
from moescale.plan import load_plan
from moescale.planner.cluster import SHIPPED, load_cluster
from moescale.records import parse_json_object
from moescale.report.observers.json_lines import METRICS_FILE, keep_records
from moescale.runtime import checkpoint as checkpoints

datasets = pytest.importorskip("datasets")

HUGE = "9" * 5000
BAD_VALUES = (
    *("null", "[]", "{}", '"x"', "-1", "0.5", "true", "1e999", "NaN", HUGE, f"-{HUGE}", "18446744073709551616"),
    *('"\\ud800"', '"../x"', '"/etc/passwd"', '"a\\u0000b"', '""', "[" * 40 + "]" * 40, '{"a":' * 40 + "1" + "}" * 40),
)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A file that the package reads: an intact one, the function that reads it, and what of it is free."""

    path: Path
    read: Callable[[], Any]
    free: str = "(?!)"
    """Paths of fields whose values have no rule but that they are JSON, or which the reader does not use."""
    num_values: int = 60
    """Values damaged in the short form: a sample of a long document."""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, model_folder, stdlib_corpus) -> Path:
    output = tmp_path_factory.mktemp("damaged") / "run"
    paths = ["--model", model_folder, "--data", stdlib_corpus, "--output", output]
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        cli.main(["run", *map(str, paths), "--steps", "1", "--device", "cpu"])
    return output


@pytest.fixture(scope="module")
def weights_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_file({"a": torch.ones(3, 4), "b": torch.ones(5)}, folder / "one.safetensors")
    index = {"metadata": {"total_size": 68}, "weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def saved_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "d"
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 8})
    datasets.DatasetDict({"train": rows}).save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="module")
def readers(tmp_path_factory, run_folder, stdlib_corpus, model_folder, weights_folder, saved_folder):
    folder = tmp_path_factory.mktemp("single")
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        cli.main(["compile", "--model", "tiny", "--output", str(folder / "plan.json")])
    cluster = folder / "cluster.toml"
    cluster.write_text((SHIPPED / "h200.toml").read_text())
    settings = folder / "settings.toml"
    settings.write_text('[compile]\nmodel = "tiny"\nsequence_length = 128\nmemory_limit = "64GB"\nplan_gpus = "1"\n')
    table = next((Path(launch_config.__file__).parent / "tables").glob("*.json"))
    own_table = folder / "table.json"
    own_table.write_text(table.read_text())
    checkpoint = checkpoints.CheckpointStore(run_folder / "checkpoints", keep=1).last()
    assert checkpoint is not None

    def read_settings() -> None:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            try:
                cli.main(["compile", "--config", str(settings)])
            except SystemExit as stop:
                if stop.code == 2:
                    raise MoescaleError("refused") from None
                assert not stop.code

    def read_state() -> None:
        checkpoints.read_training_state(checkpoint)
        checkpoints.StoredTensors(checkpoint)

    def read_metrics() -> None:
        keep_records(run_folder / METRICS_FILE, lambda record: record["step"] <= 10)

    def read_splits() -> None:
        for path in splits_of(saved_folder).values():
            open_saved_dataset(path)

    export_settings = export.ExportSettings(run=run_folder, output=folder / "out")
    return {
        "manifest.json": Reader(
            path=stdlib_corpus / "manifest.json",
            read=lambda: open_corpus(stdlib_corpus) and read_manifest(stdlib_corpus),
            free=r"made_from\b.*|bad|skipped|read|(bad|skipped|read)\..*\.first.*",
        ),
        "source.jsonl": Reader(
            path=stdlib_corpus / "source.jsonl", read=lambda: read_source_files(stdlib_corpus), free=".*"
        ),
        "plan.json": Reader(
            path=folder / "plan.json",
            read=lambda: load_plan(folder / "plan.json"),
            free=r"(dense|moe)_layers\.recompute|alternatives\b.*|prediction(\.breakdown_\w+|\.peak_moment)?|(model|cluster)_fingerprint|moescale_version",
        ),
        "cluster.toml": Reader(path=cluster, read=lambda: load_cluster(str(cluster))),
        "settings.toml": Reader(path=settings, read=read_settings, num_values=0),
        "config.json": Reader(
            path=model_folder / "config.json", read=lambda: read_model_config(model_folder), free=".*"
        ),
        "index": Reader(
            path=weights_folder / "model.safetensors.index.json",
            read=lambda: read_headers(weights_folder),
            free=r"metadata.*",
        ),
        "run.json": Reader(
            path=run_folder / "run.json", read=lambda: export._reference(export_settings), free=r"(?!model$).*"
        ),
        "metrics.jsonl": Reader(path=run_folder / METRICS_FILE, read=read_metrics, num_values=0),
        "state.json": Reader(
            path=checkpoint.path / "state.json",
            read=read_state,
            free=r"sha256|content\.state\.(settings|total_steps|identity|plan|source)\b.*",
            num_values=30,
        ),
        "dataset_dict.json": Reader(path=saved_folder / "dataset_dict.json", read=read_splits),
        "saved state.json": Reader(
            path=saved_folder / "train" / "state.json", read=read_splits, free=r"_(?!data_files).*"
        ),
        "tokenizer_config.json": Reader(
            path=model_folder / "tokenizer_config.json", read=lambda: load_tokenizer(str(model_folder)), free=".*"
        ),
        "launch table": Reader(
            path=own_table,
            read=lambda: launch_config.parse_table(
                parse_json_object(own_table.read_bytes(), "table.json", launch_config._FILE), "table.json"
            ),
            free=r"gpu|entries\[\d+\]\.(kernel|rows|num_experts|n|k)|entries\[\d+\]\.launch\.\w+",
        ),
    }


NAMES = (
    *(
        "manifest.json",
        "source.jsonl",
        "plan.json",
        "cluster.toml",
        "settings.toml",
        "config.json",
        "index",
        "run.json",
    ),
    *("metrics.jsonl", "state.json", "dataset_dict.json", "saved state.json", "tokenizer_config.json", "launch table"),
)


@pytest.fixture
def reader(request, readers) -> Iterator[Reader]:
    found = readers[request.param]
    content = found.path.read_bytes()
    yield found
    found.path.write_bytes(content)


def outcome(reader: Reader, content: bytes) -> str | None:
    """Whether damaged content is "accepted" or "refused"; the text of anything else that happened is a failure."""
    reader.path.write_bytes(content)
    try:
        reader.read()
    except MoescaleError as error:
        assert str(error) and len(str(error)) < 4000, "an error must be one that a user can read"
        return "refused"
    return "accepted"


def damaged_bytes(content: bytes, random: random.Random) -> bytes:
    """``content`` with one seeded damage of its bytes."""
    data = bytearray(content)
    kind = random.randrange(6)
    at = random.randrange(len(data))
    if kind == 0:
        data[at] ^= 1 << random.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        del data[at : at + random.randrange(1, 40)]
    elif kind == 3:
        data[at:at] = data[at : at + random.randrange(1, 200)]
    elif kind == 4:
        data[at : at + 1] = random.choice((b"[", b"{", b'"', b"\0", b"\xff", b"1e999", b"-", HUGE.encode(), b"\\ud800"))
    else:
        data[at : at + random.randrange(1, 64)] = random.randbytes(random.randrange(1, 64))
    return bytes(data)


def places(document: Any, path: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Every value of a document: how errors write its path, and its keys."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        name = f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}" if path else key
        yield name, [key]
        for inner, keys in places(value, name):
            yield inner, [key, *keys]


def replaced(document: Any, keys: list[Any], text: str) -> bytes:
    """The document as JSON, with the value at ``keys`` replaced by the JSON text."""
    document = copy.deepcopy(document)
    parent = document
    for key in keys[:-1]:
        parent = parent[key]
    parent[keys[-1]] = "\0here\0"
    return json.dumps(document).replace(json.dumps("\0here\0"), text).encode()


def check_bytes(reader: Reader, seed: str, number: int) -> None:
    generator = random.Random(seed)
    content = reader.path.read_bytes()
    assert outcome(reader, content) == "accepted"
    for _ in range(number):
        outcome(reader, damaged_bytes(content, generator))


@pytest.mark.parametrize("reader", NAMES, indirect=True)
def test_damaged_bytes_are_refused_or_read(reader, request):
    check_bytes(reader, request.node.name, 10 if reader.path.name == "settings.toml" else 40)


@pytest.mark.slow
@pytest.mark.parametrize("reader", NAMES, indirect=True)
def test_many_damaged_bytes_are_refused_or_read(reader, request):
    check_bytes(reader, request.node.name, 100 if reader.path.name == "settings.toml" else 1500)


def check_values(reader: Reader, seed: str, most: int | None) -> None:
    document = json.loads(
        reader.path.read_bytes().splitlines()[0] if reader.path.suffix == ".jsonl" else reader.path.read_bytes()
    )
    content_of = None
    if reader.path.name == "state.json" and "content" in document:
        from moescale.files import document_digest

        def content_of(text: bytes) -> bytes:  # with the checksum of a writer who means harm
            try:
                content = json.loads(text)["content"]
                return json.dumps({"sha256": document_digest(content), "content": content}).encode()
            except (ValueError, RecursionError, KeyError, TypeError):
                return text

    found = [(path, keys, bad) for path, keys in places(document) for bad in BAD_VALUES]
    if most is not None:
        found = random.Random(seed).sample(found, min(len(found), most * 5))
    accepted = []
    for path, keys, bad in found:
        text = replaced(document, keys, bad)
        if outcome(reader, content_of(text) if content_of else text) == "accepted":
            value = document
            for key in keys:
                value = value[key]
            if not re.fullmatch(reader.free, path) and not is_as_good(value, bad):
                accepted.append(f"{path} = {bad[:30]}, was {str(value)[:30]}")
    assert not accepted


def is_as_good(value: Any, bad: str) -> bool:
    """Whether the new value has the type of the old one, so that only its meaning tells; or is an absent optional."""
    if len(bad) > 1000 or bad in ("1e999", "NaN") or "[[" in bad or '{"a"' in bad:
        return False
    new = json.loads(bad)
    same_kind = isinstance(new, type(value)) or (isinstance(value, float) and isinstance(new, int))
    same_kind = same_kind and isinstance(new, bool) == isinstance(value, bool)
    return (
        same_kind or new is None or (value is None) or (isinstance(value, int | float) and isinstance(new, int | float))
    )


WITH_VALUES = tuple(name for name in NAMES if name not in ("cluster.toml", "settings.toml", "metrics.jsonl"))


@pytest.mark.parametrize("reader", WITH_VALUES, indirect=True)
def test_a_value_of_another_type_is_accepted_only_where_it_is_free(reader, request):
    check_values(reader, request.node.name, reader.num_values)


@pytest.mark.slow
@pytest.mark.parametrize("reader", WITH_VALUES, indirect=True)
def test_every_value_of_another_type_is_accepted_only_where_it_is_free(reader, request):
    check_values(reader, request.node.name, 600)


CHILD = textwrap.dedent("""
    import sys
    from pathlib import Path
    from moescale.errors import MoescaleError
    from moescale.convert.weight_files import read_headers
    from moescale.data.corpus.saved_dataset import open_saved_dataset
    from moescale.data.prepare.tokenizer import load_tokenizer

    def read(folder):
        if sys.argv[1] == "safetensors":
            read_headers(folder)
        elif sys.argv[1] == "tokenizer":
            load_tokenizer(str(folder))
        else:
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


def check_in_a_process(kind: str, folder: Path, file_name: str, work: Path, seed: str, number: int) -> None:
    generator = random.Random(seed)
    content = (folder / file_name).read_bytes()
    for index in range(number):
        copy_of = work / f"{index:05d}"
        copy_of.mkdir(parents=True)
        for path in folder.iterdir():
            if path.is_file() and path.name != file_name:
                (copy_of / path.name).write_bytes(path.read_bytes())
        (copy_of / file_name).write_bytes(damaged_bytes(content, generator))
    command = [sys.executable, "-c", CHILD, kind, str(work)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    num_read = len(done.stdout.splitlines())
    assert done.returncode == 0, f"after {num_read} of {number}, status {done.returncode}: {done.stderr[-2000:]}"
    assert num_read == number


def foreign(weights_folder: Path, model_folder: Path, saved_folder: Path) -> dict[str, tuple[Path, str]]:
    arrow = next((saved_folder / "train").glob("*.arrow"))
    return {
        "safetensors": (weights_folder, "one.safetensors"),
        "tokenizer": (model_folder, "tokenizer.json"),
        "arrow": (arrow.parent, arrow.name),
    }


@pytest.mark.parametrize("kind", ["safetensors", "tokenizer", "arrow"])
def test_damage_to_files_of_other_libraries_ends_no_process(kind, weights_folder, model_folder, saved_folder, tmp_path):
    folder, name = foreign(weights_folder, model_folder, saved_folder)[kind]
    check_in_a_process(kind, folder, name, tmp_path / "damaged", kind, 20)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "tokenizer", "arrow"])
def test_much_damage_to_files_of_other_libraries_ends_no_process(
    kind, weights_folder, model_folder, saved_folder, tmp_path
):
    folder, name = foreign(weights_folder, model_folder, saved_folder)[kind]
    check_in_a_process(kind, folder, name, tmp_path / "damaged", f"many {kind}", 400)
