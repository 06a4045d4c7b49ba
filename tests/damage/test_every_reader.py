"""Every function of the package that reads a file, and which damaged files are given to it.

A function that begins to read files fails here until it has an entry: the files that test_damaged_records.py or
test_damaged_data.py damage for it, or why nobody's file reaches it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import moescale
from damages import LIBRARIES, RECORDS, SOURCES, WITH_CHECKSUMS

PACKAGE = Path(moescale.__file__).parent
CALLS = {
    *("read_json", "read_json_object", "read_json_lines", "read_toml", "read_bytes"),  # of records
    *("parse_json", "parse_json_object", "parse_toml"),
    *("open", "open_bytes", "read_text", "pread", "GzipFile", "stream_reader"),
    *("safe_open", "load_file", "memory_map", "memmap", "fromfile", "from_file", "from_buffer"),
    *("ParquetFile", "open_file", "open_stream", "load_dataset", "load_from_disk"),
}
"""Functions and methods that read files or make values of what was in one, whatever module they are of."""
LOADERS = {"json", "pickle", "torch", "np", "numpy", "tomllib", "marshal"}
"""Modules whose ``load`` and ``loads`` do."""

TEXTS = tuple(name for name in SOURCES if name not in ("a.parquet", "a.arrow"))
COMPRESSED = tuple(name for name in SOURCES if name.endswith((".gz", ".zst")))
OWN = "what this process, or its own child, has just written"
SYSTEM = "a file of the operating system"
NO_CONTENT = "its content is not looked at, or only its bytes are counted"

READERS: dict[str, tuple[str, ...] | str] = {
    "api/export.py:_reference": ("run.json",),
    "api/train.py:_train_on_local_ranks": OWN,
    "cli/__init__.py:_with_config": ("settings.toml",),
    "cli/__init__.py:main": SYSTEM,
    "convert/adapter_folder.py:_names": ("adapter_model.safetensors",),
    "convert/adapter_folder.py:read_adapter": ("adapter_model.safetensors",),
    "convert/adapter_config.py:read_adapter_config": ("adapter_config.json",),
    "convert/hf_config.py:read_hf_config": ("config.json",),
    "convert/weight_files.py:_read_header": ("weights.safetensors",),
    "convert/weight_files.py:_read_index": ("index",),
    "convert/weight_files.py:read_parts": ("weights.safetensors",),
    "data/corpus/corpus.py:PreparedCorpus.__init__": ("train-00000.bin", "train-00000.starts", "train-00000.targets"),
    "data/corpus/corpus.py:PreparedCorpus._verifying_file": ("train-00000.bin", "train-00000.starts"),
    "data/corpus/manifest.py:read_manifest": ("manifest.json",),
    "data/corpus/manifest.py:read_source_files": ("source.jsonl",),
    "data/corpus/saved_dataset.py:_read_blocks": ("dataset.arrow",),
    "data/corpus/saved_dataset.py:_read_json": ("dataset_dict.json", "saved state.json"),
    "data/prepare/added_tokens.py:_object": ("added_tokens.json", "tokenizer_config.json"),
    "data/prepare/chat/conversations.py:_from_sharegpt": ("chat.jsonl",),
    "data/prepare/chat/conversations.py:_tools_of": ("chat.jsonl",),
    "data/prepare/chat/render_process.py:Renderer._ask": OWN,
    "data/prepare/chat/render_process.py:_answer": OWN,
    "data/prepare/chat/render_process.py:serve": OWN,
    "data/prepare/chat/spans.py:_missing_of": ("chat.jsonl",),
    "data/prepare/chat/template.py:_read": ("chat.jinja",),
    "data/prepare/chat/template.py:_variables": ("tokenizer_config.json",),
    "data/prepare/chat/template.py:find_template": ("tokenizer_config.json",),
    "data/prepare/compression.py:_Decompressed.__init__": COMPRESSED,
    "data/prepare/compression.py:_number": COMPRESSED,
    "data/prepare/compression.py:open_bytes": TEXTS,
    "data/prepare/compression.py:window_bytes_of": COMPRESSED,
    "data/prepare/discovery.py:_list_in": ("listed dataset.json",),
    "data/prepare/encode.py:Encoder.__call__": OWN,
    "data/prepare/encode.py:Encoder.__init__": OWN,
    "data/prepare/encode.py:Encoder._encode_range": ("long.txt",),
    "data/prepare/encode.py:Encoder._read_line": ("a.jsonl", "a.jsonl.gz", "a.json"),
    "data/prepare/encode.py:_lines_of": ("a.jsonl",),
    "data/prepare/encode.py:_read_files": ("a.txt", "a.txt.gz"),
    "data/prepare/file_kinds.py:_first_line_is_an_object": ("a.jsonl", "a.jsonl.gz"),
    "data/prepare/file_kinds.py:kind_of": TEXTS,
    "data/prepare/hub.py:_load": "a stream of the hub's library, whose errors hub.py names",
    "data/prepare/parquet_pages.py:largest_page_bytes": ("a.parquet",),
    "data/prepare/readers.py:line_chunks": ("a.jsonl.gz",),
    "data/prepare/readers.py:long_document": ("long.txt",),
    "data/prepare/record_files.py:_rows": ("a.csv", "a.csv.zst"),
    "data/prepare/record_files.py:array_elements": ("a.json", "a.json.zst"),
    "data/prepare/record_files.py:first_element": ("a.json", "a.json.zst"),
    "data/prepare/splitting.py:_ranges_of": ("long.txt",),
    "data/prepare/table_process.py:serve": OWN,
    "data/prepare/file_kinds.py:columns_of": ("chat.parquet", "chat.arrow"),
    "data/prepare/sources.py:_columns_of": ("chat.jsonl",),
    "data/prepare/table_records.py:_parquet_batches": ("chat.parquet",),
    "data/prepare/table_records.py:_opened": ("chat.arrow",),
    "data/prepare/tables.py:arrow_texts": ("a.arrow",),
    "data/prepare/tables.py:parquet_texts": ("a.parquet",),
    "data/prepare/tokenizer.py:_configured_end_tokens": ("tokenizer_config.json",),
    "data/prepare/tokenizer_file.py:read_tokenizer": ("tokenizer.json",),
    "data/prepare/word_table.py:word_encoder": OWN,
    "files.py:_holder": "shown to the user, 200 bytes of it at most",
    "files.py:_open_locked": NO_CONTENT,
    "files.py:file_digest": NO_CONTENT,
    "files.py:is_locked": NO_CONTENT,
    "files.py:sync": NO_CONTENT,
    "files.py:written_by_library": NO_CONTENT,
    "kernels/experts/launch_config.py:load_tables": ("launch table",),
    "plan.py:ParallelPlan.from_json": ("plan.json",),
    "plan.py:load_plan": ("plan.json",),
    "planner/cluster.py:load_cluster": ("cluster.toml",),
    "planner/cluster.py:parse_cluster_text": ("cluster.toml",),
    "planner/explain.py:explain_html": "the package's own template",
    "planner/explain.py:explain_json": OWN,
    "report/observers/json_lines.py:_parse": ("metrics.jsonl",),
    "report/observers/wandb.py:_identifier": ("run-id",),
    "report/style.py:": "the package's own style",
    "runtime/checkpoint.py:StoredTensors._open": ("tensors-00000-0000.safetensors",),
    "runtime/checkpoint.py:_problem_of": ("tensors-00000-0000.safetensors",),
    "runtime/checkpoint_state.py:read_stored": ("state.json",),
    "runtime/checkpoint_writer.py:CheckpointWriter._name": OWN,
    "runtime/checkpoint_writer.py:_check_written": OWN,
    "runtime/device.py:available_cgroup_bytes": SYSTEM,
    "runtime/device.py:available_host_bytes": SYSTEM,
    "runtime/peer_dispatch.py:_boot_id": SYSTEM,
    "tools/profile_table.py:read_profile": ("kernels.json",),
    "tools/reference_table/published.py:read_published": "the package's own figures",
    "tools/reference_table/rows.py:_measured_experts": ("experts.json",),
    "tools/reference_table/rows.py:_measured_steps": ("step.json",),
    "tools/report/page.py:_render": "the package's own template",
    "tools/report/run_data.py:_lines": ("expert_load.jsonl", "warnings.jsonl"),
    "tools/report/run_data.py:read_run": ("reported run.json", "metrics.jsonl"),
    "runtime/watchdog.py:Watchdog._read": "a rank's own beat, from the store of the run",
}


def reads(call: ast.Call) -> bool:
    """Whether a call reads a file, as far as its name and a mode that it spells tell."""
    function = call.func
    if isinstance(function, ast.Attribute) and function.attr in ("load", "loads"):
        return isinstance(function.value, ast.Name) and function.value.id in LOADERS | {"json_module"}
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
    given = [*call.args, *(word.value for word in call.keywords)]
    modes = {part.value for part in given if isinstance(part, ast.Constant) and isinstance(part.value, str)}
    return name in CALLS and not modes & {"w", "wb", "a", "ab", "x", "xb"}


def readers_of(tree: ast.AST, names: tuple[str, ...] = ()) -> Iterator[str]:
    """Names of the functions that read files themselves, with the classes they are in."""
    if isinstance(tree, ast.FunctionDef | ast.ClassDef):
        names = (*names, tree.name)
    if isinstance(tree, ast.Call) and reads(tree):
        yield ".".join(names)
    for child in ast.iter_child_nodes(tree):
        yield from readers_of(child, names)


def test_every_function_that_reads_a_file_has_an_entry():
    found = {
        f"{path.relative_to(PACKAGE).as_posix()}:{name}"
        for path in PACKAGE.rglob("*.py")
        if not path.is_relative_to(PACKAGE / "records")
        for name in readers_of(ast.parse(path.read_text()))
    }
    assert found == READERS.keys()


def test_the_files_of_every_entry_are_damaged_and_every_damaged_file_is_read():
    damaged = {*RECORDS, *SOURCES, *WITH_CHECKSUMS, *LIBRARIES}
    assert {name for entry in READERS.values() if isinstance(entry, tuple) for name in entry} == damaged


def test_a_new_reader_would_be_found():
    for source in (
        "open(path)",
        "path.open()",
        "path.read_bytes()",
        "json.load(file)",
        "with safe_open(path, framework='pt') as file: pass",
        "numpy.memmap(path, mode='r')",
        "read_json(path, KIND)",
    ):
        assert list(readers_of(ast.parse(f"class A:\n  def b(self):\n    {source}"))) == ["A.b"]
    for source in ("open(path, 'w')", "path.open('ab')", "path.write_bytes(b'')", "tl.load(pointer)"):
        assert not list(readers_of(ast.parse(source)))
