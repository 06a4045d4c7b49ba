"""Names that are a local path or a repository on the Hugging Face hub: which it is, and fetching. No torch here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from moescale.errors import MoescaleError, nearest

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def looks_like_path(name: str) -> bool:
    """Whether ``name`` means a place on this machine, there or not: such a name is never looked up on the hub.

    A hub name is ``name`` or ``owner/name``. Whatever begins like a path, has more parts, names a JSON file, or begins
    with a folder that exists here, is a path.
    """
    if name.startswith((".", "/", "~")) or name.endswith(".json") or not _REPOSITORY.fullmatch(name):
        return True
    return "/" in name and Path(name).parent.is_dir()


def nearest_here(path: Path) -> str:
    """Return ``"; did you mean 'x'?"`` for what lies where ``path`` does not and is spelt almost so, or nothing.

    Where ``path`` cannot be a hub name, and the folder that would hold it is missing too, that is said instead.
    """
    try:
        names = {entry.name: str(path.parent / entry.name) for entry in path.parent.iterdir()}
    except OSError:
        return f"; the folder {path.parent} does not exist either" if looks_like_path(str(path)) else ""
    near = nearest(path.name, names, cutoff=0.6)
    return next((near.replace(name, full) for name, full in names.items() if f"'{name}'" in near), "")


def fetch_repository(name: str, patterns: Sequence[str], *, what: str, error: type[MoescaleError]) -> Path:
    """Return the local folder of a repository's files that match ``patterns``, downloaded once and then cached.

    A hub that does not answer is said at once, without retries. Raises ``error``, naming ``what`` was looked for.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as cause:  # the client raises its own, the HTTP library's, OSError and ValueError
        near = nearest_here(Path(name))
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise error(
            f"{what} '{name}' does not exist: {Path.cwd()} has no such folder{near}, and fetching it from the hub "
            f"failed: {reason}; check the spelling, and for a name on the hub the connection"
        ) from None
