"""What is damaged, and how: of a file's bytes by seeded chance, of a document every value by one that must not pass."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

HUGE = "9" * 5000
BAD_VALUES = (
    *("null", "[]", "{}", '"x"', "-1", "0.5", "true", "1e999", "NaN", HUGE, f"-{HUGE}", "18446744073709551616"),
    *('"\\ud800"', '"../x"', '"/etc/passwd"', '"a\\u0000b"', '""', "[" * 40 + "]" * 40, '{"a":' * 40 + "1" + "}" * 40),
)

RECORDS = (
    *("manifest.json", "source.jsonl", "plan.json", "cluster.toml", "settings.toml", "config.json", "index"),
    *("run.json", "metrics.jsonl", "state.json", "dataset_dict.json", "saved state.json", "listed dataset.json"),
    *("tokenizer_config.json", "added_tokens.json", "launch table"),
    *("adapter_config.json", "reported run.json", "expert_load.jsonl", "warnings.jsonl", "kernels.json"),
    *("run-id", "experts.json", "step.json"),
)
"""Files of records, damaged in test_damaged_records.py."""
SOURCES = (
    *("a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "long.txt"),
    *("a.txt.gz", "a.jsonl.gz", "a.json.zst", "a.csv.zst"),
    *("chat.jsonl", "chat.parquet", "chat.arrow", "chat.jinja"),
)
"""Files of text that `prepare` reads, damaged in test_damaged_data.py."""
WITH_CHECKSUMS = ("train-00000.bin", "train-00000.starts", "train-00000.targets", "tensors-00000-0000.safetensors")
"""Files that this package writes with a checksum, damaged there."""
LIBRARIES = ("weights.safetensors", "adapter_model.safetensors", "tokenizer.json", "dataset.arrow")
"""Files that libraries in other languages read without one, damaged there."""


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
