"""Text to packed token sequences: one pass over the source, all cores, bounded memory, whole or not at all.

Worker processes read and tokenise chunks; this process takes them in order, deals documents to the splits, packs and
writes. The bytes written depend on the source, the tokenizer and the settings in the manifest, on nothing else.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from moescale.config import fingerprint
from moescale.data.corpus import PreparedCorpus
from moescale.data.corpus.manifest import (
    FIRST_POSITIONS,
    SOURCE_FILES,
    BadItems,
    Manifest,
    read_manifest,
    read_source_files,
)
from moescale.data.prepare.atomic_folder import staged, writing
from moescale.data.prepare.chat.encode import ChatOptions
from moescale.data.prepare.chat.render_process import RenderOptions
from moescale.data.prepare.chat.template import find_template
from moescale.data.prepare.dealing import dealer_for
from moescale.data.prepare.encode import EncodedChunk, Fault, token_dtype
from moescale.data.prepare.file_kinds import DOCUMENT
from moescale.data.prepare.memory_budget import Resources, resources_for
from moescale.data.prepare.progress import Progress
from moescale.data.prepare.report import PrepareReport
from moescale.data.prepare.settings import PrepareSettings
from moescale.data.prepare.shard_writer import SplitWriter
from moescale.data.prepare.sources import Source, open_source
from moescale.data.prepare.tokenizer import CorpusTokenizer, load_tokenizer
from moescale.data.prepare.workers import encode
from moescale.errors import DataError


def prepare(settings: PrepareSettings, progress: bool = True) -> PrepareReport:
    """Tokenise ``settings.source`` and pack it into ``settings.output``, or find that this was done before.

    Raises:
        DataError: the source or tokenizer cannot be used; with ``strict``, a bad line; the output exists and was made
            from other input or is damaged, or cannot be written; there is less than one sequence to train on.
    """
    began = time.monotonic()
    _check_output(settings.output)
    tokenizer = load_tokenizer(settings.tokenizer, settings.end_token)
    source = open_source(settings)
    chat = _chat_options(settings, tokenizer) if source.holds_conversations else None
    made_from = _made_from(settings, source, tokenizer, chat)
    if settings.output.is_dir() and any(settings.output.iterdir()):
        manifest = _check_same_input(settings, source, made_from)
        return PrepareReport.of(
            manifest, output=settings.output, unchanged=True, seconds=0.0, num_workers=0, notices=source.notices
        )

    resources = resources_for(
        settings,
        vocabulary_size=tokenizer.vocabulary_size,
        source_bytes=source.num_bytes,
        window_bytes=source.window_bytes,
        has_tables=source.has_tables,
        packed_splits=0 if chat is None else 1 + settings.has_validation,
    )
    with staged(settings.output) as folder:
        manifest = _write(
            settings, source, tokenizer, folder, made_from, resources, Progress(source.num_bytes, progress), chat
        )
        with writing(folder):
            with (folder / SOURCE_FILES).open("w") as stream:
                stream.writelines(json.dumps(line) + "\n" for line in source.identity())
            manifest.write(folder)
    return PrepareReport.of(
        manifest,
        output=settings.output,
        unchanged=False,
        seconds=time.monotonic() - began,
        num_workers=resources.num_workers,
        memory_limited=resources.memory_limited,
        notices=source.notices,
    )


def _check_output(output: Path) -> None:
    """Raise an error now for an output that would fail at the end, when the finished folder is renamed to ``output``.

    Raises:
        DataError: ``output`` is a file, cannot be read, or is a folder that nothing can be renamed to.
    """
    try:
        if output.exists() and not output.is_dir():
            raise DataError(f"prepare.output ({output}) is a file; name a folder")
        is_empty_folder = output.is_dir() and not any(output.iterdir())
        is_fixed = is_empty_folder and (output.is_mount() or output.samefile("."))
    except OSError as error:
        raise DataError(f"prepare.output ({output}) cannot be read: {error.strerror}; choose another output") from error
    if is_fixed:
        raise DataError(
            f"prepare.output ({output}) is the working directory or a mount point, which the finished corpus cannot "
            f"replace; name a folder in it, such as {output / 'corpus'}"
        )


def _chat_options(settings: PrepareSettings, tokenizer: CorpusTokenizer) -> ChatOptions:
    template = find_template(tokenizer.files, settings.chat_template)
    date = settings.template_date
    if date is None and template.uses_date:
        with suppress(DataError):  # an output that does not exist or is not a corpus is reported elsewhere
            date = read_manifest(settings.output).made_from.get("template_date")
        date = date or datetime.now().date().isoformat()
    return ChatOptions(
        render=RenderOptions(source=template, loss_on=settings.loss_on, date=date if template.uses_date else None),
        sequence_length=settings.sequence_length,
        too_long=settings.too_long,
    )


def _made_from(
    settings: PrepareSettings, source: Source, tokenizer: CorpusTokenizer, chat: ChatOptions | None
) -> dict[str, Any]:
    of_chat = {}
    if chat is not None:
        of_chat = {
            "format": "chat",
            "loss_on": settings.loss_on,
            "too_long": settings.too_long,
            "chat_template": fingerprint([chat.render.source.templates, chat.render.source.variables]),
            "template_date": chat.render.date,
        }
    return of_chat | {
        "source": source.name,
        "source_kind": source.kind,
        "source_fingerprint": fingerprint(source.identity()),
        "tokenizer": settings.tokenizer,
        "tokenizer_sha256": tokenizer.sha256,
        "end_token": tokenizer.end_token,
        "end_token_id": tokenizer.end_token_id,
        "sequence_length": settings.sequence_length,
        "text_column": settings.text_column,
        "split": settings.split or "train",
        "validation_fraction": settings.validation_fraction,
        **({} if settings.validation_documents is None else {"validation_documents": settings.validation_documents}),
        "document_boundaries": settings.document_boundaries or chat is not None,
        "seed": settings.seed,
    }


def _check_same_input(settings: PrepareSettings, source: Source, made_from: dict[str, Any]) -> Manifest:
    """Return the manifest of the existing output; raise the difference from what is asked for now, or its damage."""
    output = settings.output
    manifest = read_manifest(output)
    # The names by which source and tokenizer were given may differ; what counts is what was read.
    for key in sorted((made_from.keys() | manifest.made_from.keys()) - {"source", "tokenizer"}):
        then, now = manifest.made_from.get(key), made_from.get(key)
        if then == now:
            continue
        difference = f"{key} was {then!r} and is now {now!r}"
        if key == "source_fingerprint":
            difference = _changed_file(output, source)
        raise DataError(
            f"{output} was prepared from other input: {difference}; choose another output, or remove {output} first"
        )
    for split in manifest.shards:
        PreparedCorpus(output, manifest, split)  # checks that every file is there, whole
    left_out = manifest.bad | {reason: items for reason, items in manifest.skipped.items() if reason == "binary"}
    for kind, items in left_out.items():
        if settings.strict:
            raise DataError(f"{items.first[0]}: {kind.replace('_', ' ')} (strict); {output} was prepared without it")
    return manifest


def _changed_file(output: Path, source: Source) -> str:
    try:
        then = read_source_files(output)
    except DataError as error:
        return f"files of the source have changed (which ones is not known: {error})"
    now = {line[0]: line[1:] for line in source.identity()}
    for name in sorted(then.keys() | now.keys(), key=str):
        if name not in now:
            return f"'{name}' is gone from the source"
        if name not in then:
            return f"'{name}' is new in the source"
        if then[name] != now[name]:
            return f"'{name}' has changed"
    return "its files come in another order"


class _Accounts:
    """Turns faults and counts of chunks into those of the source."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.bad: dict[str, BadItems] = {}
        self.binary = BadItems(count=0, first=[])
        self.documents = 0
        self.origins = 0
        self._path: str | None = None
        self._items_before = 0

    def add(self, chunk: EncodedChunk) -> None:
        if chunk.path != self._path:
            self._path, self._items_before = chunk.path, 0
        for fault in chunk.bad:
            self._add_fault(fault, chunk.path)
        for path in chunk.binary:
            if self.strict:
                raise DataError(f"{path}: not read: binary (strict); leave it out with --exclude")
            self.binary = _added(self.binary, 1, path)
        self._items_before += chunk.num_items
        self.documents += len(chunk.lengths) - chunk.continues
        self.origins += chunk.num_origins - chunk.continues

    def _add_fault(self, fault: Fault, path: str | None) -> None:
        where = fault.where
        position = where if isinstance(where, str) else f"{path}:{self._items_before + where + 1}"
        detail = f": {fault.detail}" if fault.detail else ""
        if self.strict:
            raise DataError(f"{position}: {fault.kind.replace('_', ' ')} (strict){detail}")
        known = self.bad.get(fault.kind, BadItems(count=0, first=[]))
        self.bad[fault.kind] = _added(known, fault.amount, position, fault.detail)

    def to_text(self) -> str:
        """Describe the omitted items, for the error of an empty corpus."""
        lines = [
            f"{items.count:,} {kind.replace('_', ' ')} ({', '.join(items.first[:3])})"
            + (f": {items.detail}" if items.detail else "")
            for kind, items in sorted(self.bad.items())
        ]
        if self.binary.count:
            lines.append(f"{self.binary.count:,} binary ({', '.join(self.binary.first[:3])})")
        return "; ".join(lines)


def _added(known: BadItems, count: int, position: str, detail: str = "") -> BadItems:
    first = [*known.first, position] if len(known.first) < FIRST_POSITIONS else known.first
    return BadItems(count=known.count + count, first=first, detail=known.detail or detail)


def _write(
    settings: PrepareSettings,
    source: Source,
    tokenizer: CorpusTokenizer,
    folder: Path,
    made_from: dict[str, Any],
    resources: Resources,
    progress: Progress,
    chat: ChatOptions | None,
) -> Manifest:
    dtype = token_dtype(tokenizer.vocabulary_size)
    writers = {
        split: SplitWriter(
            folder,
            split,
            sequence_length=settings.sequence_length,
            dtype=dtype,
            document_boundaries=settings.document_boundaries or chat is not None,
            padding_id=None if chat is None else tokenizer.end_token_id,
        )
        for split in (("train", "validation") if settings.has_validation else ("train",))
    }
    dealer = dealer_for(settings, writers)
    accounts = _Accounts(settings.strict)
    encoded = encode(
        source,
        options={
            "tokenizer_json": tokenizer.tokenizer.to_str(),
            "end_token_id": tokenizer.end_token_id,
            "vocabulary_size": tokenizer.vocabulary_size,
            "text_column": settings.text_column,
            "chat": chat,
        },
        resources=resources,
    )
    try:
        with progress:
            for chunk in encoded:
                first_document = accounts.documents - chunk.continues
                first_origin = accounts.origins - chunk.continues
                accounts.add(chunk)
                dealer.deal(chunk, first_origin)
                progress.advance(
                    num_bytes=chunk.num_bytes, documents=accounts.documents - first_document, tokens=len(chunk.tokens)
                )
            dealer.finish()
            counts = {split: writer.close() for split, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    if counts["train"].num_sequences == 0:
        left_out = accounts.to_text()
        raise DataError(
            f"{source.name}: the train split has {counts['train'].tokens_in} tokens of {counts['train'].documents} "
            f"documents, less than one sequence of prepare.sequence_length ({settings.sequence_length})"
            + (f"; left out: {left_out}" if left_out else "")
            + (f"; the chat template is {chat.render.source.path}" if chat is not None else "")
        )
    if settings.strict and any(count.num_sequences == 0 for count in counts.values()):
        held_out = counts["validation"]
        name = "validation_fraction" if settings.validation_documents is None else "validation_documents"
        raise DataError(
            f"prepare.{name} ({getattr(settings, name)}) sets {held_out.tokens_in} tokens of "
            f"{held_out.documents} documents aside, less than one sequence of prepare.sequence_length "
            f"({settings.sequence_length}) (strict); raise it"
        )
    skipped = source.skipped | ({"binary": accounts.binary} if accounts.binary.count else {})
    return Manifest(
        made_from=made_from,
        sequence_length=settings.sequence_length,
        vocabulary_size=tokenizer.vocabulary_size,
        dtype="<u2" if dtype.itemsize == 2 else "<u4",
        document_boundaries=settings.document_boundaries or chat is not None,
        bad=dict(sorted(accounts.bad.items())),
        skipped=skipped,
        read=_read_without(source.read, accounts.binary),
        counts=counts,
        shards={split: writer.shards for split, writer in writers.items() if writer.shards},
    )


def _read_without(read: dict[str, BadItems], binary: BadItems) -> dict[str, BadItems]:
    """Return the accounts of the files read, less those that turned out to be no text."""
    text = read.get(DOCUMENT)
    if text is None or not binary.count:
        return read
    first = [name for name in text.first if not any(path.endswith(name) for path in binary.first)]
    return read | {DOCUMENT: BadItems(count=text.count - binary.count, first=first)}
