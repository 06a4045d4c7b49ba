"""Every file of records, damaged: a record that keeps every rule, or an error for the user; never anything else.

Two kinds of damage. *Values*: every value of a document in turn is replaced by one of another type, size or depth; it
may be accepted only where the field is free or the value is as good as the one before. *Bytes*: bits flipped, bytes
cut, doubled and overwritten, seeded.
"""

import contextlib
import io
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from damages import BAD_VALUES, RECORDS, damaged_bytes, is_as_good, places, replaced
from moescale import cli
from moescale.api import export
from moescale.convert.adapter_folder import read_adapter_settings
from moescale.convert.hf_config import read_model_config
from moescale.convert.weight_files import read_headers
from moescale.data.corpus import open_corpus
from moescale.data.corpus.manifest import read_manifest, read_source_files
from moescale.data.corpus.saved_dataset import open_saved_dataset, splits_of
from moescale.data.loader import Loader
from moescale.data.prepare.discovery import Wanted, find_files
from moescale.data.prepare.tokenizer import load_tokenizer
from moescale.errors import MoescaleError
from moescale.kernels.experts import launch_config
from moescale.plan import load_plan
from moescale.planner.cluster import SHIPPED, load_cluster
from moescale.records import parse_json_object
from moescale.report.observers.json_lines import METRICS_FILE, keep_records
from moescale.report.observers.wandb import _identifier
from moescale.runtime.checkpoint import StoredTensors, read_training_state
from moescale.runtime.checkpoint_store import CheckpointStore
from moescale.tools.profile_table import read_profile
from moescale.tools.reference_table.rows import _measured_experts, _measured_steps
from moescale.tools.report.page import described, summarized
from moescale.tools.report.run_data import read_run

datasets = pytest.importorskip("datasets")


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
def readers(tmp_path_factory, adapter_folder, run_folder, stdlib_corpus, model_folder, weights_folder, saved_folder):
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
    checkpoint = CheckpointStore(run_folder / "checkpoints", keep=1).last()
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
        loader = Loader(open_corpus(stdlib_corpus), sequences_per_step=1, micro_batch_sequences=1, seed=0)
        loader.load_state_dict(read_training_state(checkpoint)["source"])
        StoredTensors(checkpoint)

    (run_folder / "warnings.jsonl").write_text('{"step": 1, "kind": "k", "message": "m", "advice": "a"}\n')
    kernels = [{"name": "a", "launches": 3, "microseconds": 2.5}]
    document = {"device": "cpu", "first_step": 1, "steps": 2, "kernels": kernels}
    (folder / "kernels.json").write_text(json.dumps(document))

    def read_page() -> None:
        run = read_run(run_folder)
        described(run), summarized(run)

    def read_metrics() -> None:
        read_page()
        keep_records(run_folder / METRICS_FILE, lambda record: record["step"] <= 10)

    (folder / "run-id").write_text("0123456789abcdef\n")

    def read_splits() -> None:
        for path in splits_of(saved_folder).values():
            open_saved_dataset(path)

    results_folder = folder / "results"
    (results_folder / "h200").mkdir(parents=True)
    experts_row = {"scope": "mlp", "routing": "uniform", "backend": "triton", "tokens": 8192, "num_experts": 64}
    experts_row |= {"top_k": 6, "forward_ms": 1.5, "backward_ms": 3.0}
    (results_folder / "experts.json").write_text(json.dumps({"gpu": "NVIDIA H200", "rows": [experts_row]}))
    (results_folder / "h200" / "step.json").write_text('{"tokens_per_second": 31000.0, "gpu": "NVIDIA H200"}')

    def read_steps() -> None:
        list(_measured_steps(results_folder))

    wanted = Wanted(text_column="text", split=None, include=(), exclude=(), output=folder / "out")
    added_tokens_folder = folder / "tokenizer"
    added_tokens_folder.mkdir()
    (added_tokens_folder / "tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes())
    (added_tokens_folder / "special_tokens_map.json").write_text('{"eos_token": "<|end_of_text|>"}')
    (added_tokens_folder / "added_tokens.json").write_text('{"<|user|>": 512, "<|assistant|>": 513}')
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
            free=r"layers\[\d\]\.(kind|recompute)|alternatives\b.*|prediction(\.breakdown_\w+|\.peak_moment)?|(model|cluster)_fingerprint|moescale_version",
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
        "adapter_config.json": Reader(
            path=adapter_folder / "adapter_config.json",
            read=lambda: read_adapter_settings(adapter_folder, read_model_config(model_folder)),
            free=r"(?!r$|lora_alpha|lora_dropout|use_|bias|peft_type|rank_pattern|alpha_pattern|modules_to_save).*",
        ),
        "reported run.json": Reader(path=run_folder / "run.json", read=read_page, free=r"(?!plan\b).*|plan\..*"),
        "expert_load.jsonl": Reader(path=run_folder / "expert_load.jsonl", read=read_page),
        "warnings.jsonl": Reader(path=run_folder / "warnings.jsonl", read=read_page, free="kind|message|advice"),
        "kernels.json": Reader(
            path=folder / "kernels.json", read=lambda: read_profile(folder / "kernels.json"), free=r"device|.*\.name"
        ),
        "experts.json": Reader(
            path=results_folder / "experts.json",
            read=lambda: _measured_experts(results_folder / "experts.json", results_folder),
            free=r"gpu|rows\[0\]\.(scope|routing|backend)",
        ),
        "step.json": Reader(path=results_folder / "h200" / "step.json", read=read_steps, free="gpu"),
        "run-id": Reader(path=folder / "run-id", read=lambda: _identifier(folder / "run-id", is_resumed=True)),
        "metrics.jsonl": Reader(path=run_folder / METRICS_FILE, read=read_metrics, num_values=0),
        "state.json": Reader(
            path=checkpoint.path / "state.json",
            read=read_state,
            free=r"sha256|content\.state\.(settings|total_steps|identity|plan)\b.*",
            num_values=30,
        ),
        "dataset_dict.json": Reader(path=saved_folder / "dataset_dict.json", read=read_splits),
        "saved state.json": Reader(
            path=saved_folder / "train" / "state.json", read=read_splits, free=r"_(?!data_files).*"
        ),
        "listed dataset.json": Reader(
            path=saved_folder / "train" / "state.json",
            read=lambda: find_files([str(saved_folder / "train")], wanted),
            free=r"_(?!data_files\[).*",
        ),
        "added_tokens.json": Reader(
            path=added_tokens_folder / "added_tokens.json", read=lambda: load_tokenizer(str(added_tokens_folder))
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


def check_bytes(reader: Reader, seed: str, number: int) -> None:
    generator = random.Random(seed)
    content = reader.path.read_bytes()
    assert outcome(reader, content) == "accepted"
    for _ in range(number):
        outcome(reader, damaged_bytes(content, generator))


@pytest.mark.parametrize("reader", RECORDS, indirect=True)
def test_damaged_bytes_are_refused_or_read(reader, request):
    check_bytes(reader, request.node.name, 10 if reader.path.name == "settings.toml" else 40)


@pytest.mark.slow
@pytest.mark.parametrize("reader", RECORDS, indirect=True)
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
        text = replaced(document, keys, bad) + (b"\n" if reader.path.suffix == ".jsonl" else b"")
        if outcome(reader, content_of(text) if content_of else text) == "accepted":
            value = document
            for key in keys:
                value = value[key]
            if not re.fullmatch(reader.free, path) and not is_as_good(value, bad):
                accepted.append(f"{path} = {bad[:30]}, was {str(value)[:30]}")
    assert not accepted


WITH_VALUES = tuple(
    name for name in RECORDS if name not in ("cluster.toml", "settings.toml", "metrics.jsonl", "run-id")
)


@pytest.mark.parametrize("reader", WITH_VALUES, indirect=True)
def test_a_value_of_another_type_is_accepted_only_where_it_is_free(reader, request):
    check_values(reader, request.node.name, reader.num_values)


@pytest.mark.slow
@pytest.mark.parametrize("reader", WITH_VALUES, indirect=True)
def test_every_value_of_another_type_is_accepted_only_where_it_is_free(reader, request):
    check_values(reader, request.node.name, 600)
