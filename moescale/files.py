"""Files and folders that are whole or absent: atomic writes, syncs, locks and digests. Imports no torch.

A name given here is durable: the content is synced, then renamed into place, then the folder that holds the name is
synced. A file has the mode that the process's umask gives, whatever library wrote it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moescale.errors import ConfigError

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})
"""What file systems without locks answer."""


_FREE_SPACE = "free space, or give a path on another disk"
_ALLOW = "give a path that you may use, or allow it"
_REMEDIES: dict[int | None, str] = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: _FREE_SPACE,
    errno.EACCES: _ALLOW,
    errno.EPERM: _ALLOW,
    errno.EROFS: _ALLOW,
    errno.ENOTDIR: "give a path whose parent is a folder",
    errno.EEXIST: "give another path, or remove it",
    errno.ENOTEMPTY: "give another path, or remove it",
}


class InUseError(Exception):
    """Another process holds a lock. ``holder`` says which one, as far as it is known."""

    def __init__(self, path: Path, holder: str = "") -> None:
        super().__init__(f"{path} is held by {holder or 'another process'}")
        self.path = path
        self.holder = holder


def remedy(error: BaseException) -> str | None:
    """Return what helps against the system's refusal ``error``, or None where that is not known.

    The errors of libraries in Rust, as safetensors', are read as well: they end in ``(os error 28)``.
    """
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    return _REMEDIES.get(number)


def check_can_be_written(path: Path, option: str) -> None:
    """Raise ConfigError, naming ``option``, where a file ``path`` could not be written; for before the work."""
    if os.path.isdir(path):
        raise ConfigError(f"{option} ({path}) is a folder; name a file in it")
    # Without permission os.path returns False, while Path.exists raises; the closed folder is then found above.
    folder = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    if not folder.is_dir():
        raise ConfigError(f"{option} ({path}) cannot be written: {folder} is not a folder; give another path")
    if not os.access(folder, os.W_OK | os.X_OK) or (os.path.exists(path) and not os.access(path, os.W_OK)):
        raise ConfigError(f"{option} ({path}) cannot be written: Permission denied; give another path")


def sync(path: Path) -> None:
    """Make a file's content, or a folder's names, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Sync every file and folder in ``folder``, and ``folder`` itself; links are not followed."""
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink():
            continue
        if entry.is_dir():
            sync_tree(entry)
        elif entry.is_file():
            sync(entry)
    sync(folder)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a start after a crash, finds the old content or the new one, never a part.

    Text is written as UTF-8. A link is followed. What is not a regular file, such as ``/dev/stdout``, is written to.
    """
    encoded = content.encode() if isinstance(content, str) else content
    target = path.resolve()
    if target.exists() and not target.is_file():
        target.write_bytes(encoded)
        return
    temporary = target.with_name(f".{target.name}.writing")
    descriptor = _open_locked(temporary, os.O_RDWR | os.O_CREAT, wait=True)
    with os.fdopen(descriptor, "wb") as file:  # the lock is held until the name is given: writers come one by one
        try:
            file.truncate()
            file.write(encoded)
            file.flush()
            os.fsync(file.fileno())
            temporary.rename(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync(target.parent)


@contextmanager
def written_by_library(path: Path) -> Iterator[None]:
    """Have a library write the file ``path``; when the block ends it has the umask's mode and is synced.

    Libraries that write by a temporary file, as safetensors does, leave it readable for its owner only.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    yield
    os.chmod(path, mode)
    sync(path)


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder next to ``output`` that takes its name when the block ends, and goes when it fails.

    Everything in it is synced first. What a killed process left there is removed at the start. ``output`` must not
    exist, or be an empty folder, when the block ends: OSError otherwise.

    Raises:
        InUseError: another process is writing the same ``output``. The kernel releases its lock however it ends.
        OSError: the system refuses to write there.
    """
    target = output.resolve()
    folder = staging_path(target)
    lock = _lock_folder(folder)
    try:
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        try:
            yield folder
            sync_tree(folder)
            folder.rename(target)  # over an empty folder at most: the kernel refuses any other
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        sync(target.parent)
    finally:
        os.close(lock)


def staging_path(output: Path) -> Path:
    """Return the hidden folder next to ``output``, wherever a link to it leads, in which it is made."""
    target = output.resolve()
    return target.with_name(f".{target.name}.incomplete")


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold the lock ``path``, which is created and stays; it means nothing by itself.

    The kernel releases the lock however the process ends. On a file system without locks there is none.

    Raises:
        InUseError: another process holds it.
        OSError: it cannot be created.
    """
    descriptor = _open_locked(path, os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock ``path``, without changing it; False where there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def document_digest(document: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON document, whatever its white space."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _lock_folder(folder: Path) -> int:
    while True:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
            is_new = True
        except FileExistsError:
            is_new = False
        try:
            return _open_locked(folder, os.O_RDONLY, requires_lock=not is_new)
        except FileNotFoundError:  # who held it has finished meanwhile
            continue


def _open_locked(path: Path, flags: int, *, wait: bool = False, requires_lock: bool = False) -> int:
    """Open ``path`` and lock it; the descriptor, whose closing releases it.

    Args:
        wait: until whoever holds it has gone; else that raises InUseError.
        requires_lock: raise InUseError where the file system has no locks.
    """
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            holder = _holder(descriptor)
            if error.errno in _NO_LOCKS and not requires_lock:
                return descriptor
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES, *_NO_LOCKS):
                raise InUseError(path, holder) from error
            raise
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)  # renamed or removed by the process that held it: another file has the name by now, if any


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    try:
        return os.pread(descriptor, 200, 0).decode(errors="replace").strip()
    except OSError:  # a folder
        return ""
