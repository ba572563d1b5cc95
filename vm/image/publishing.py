"""Files that appear whole or not at all, and how it is seen that one was changed since."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.manifest import StoredFile

PUBLISHED = 946_684_800
"""The modification time of every published file, in seconds since 1970: the year 2000. What was
written to since has another."""

TEMPORARY = ".new-"
"""How names begin that are not published yet, or no longer."""

_LOCK_PAUSE = 0.05


def digest_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stored_file(path: Path, root: Path, shown: Path | None = None) -> StoredFile:
    """The record of a file; `shown` is where it will be, if it is elsewhere now."""
    place = (shown or path).relative_to(root).as_posix()
    return StoredFile(place, digest_of(path), path.stat().st_size)


@contextlib.contextmanager
def locked(path: Path, timeout: float) -> Iterator[None]:
    """Holds the lock file at `path`; it ends with the process, however that ends. Raises
    ImageError where another process holds it for longer than `timeout` seconds."""
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    with explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ImageError(
                        f"another process has held {path} for {timeout:.0f} s; see which with "
                        f"`fuser {path}`, and try again when it is done"
                    ) from None
            pause.wait(_LOCK_PAUSE)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def explained(place: Path) -> Iterator[None]:
    """Turns an OSError into an ImageError that says what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "make room there (`voidbus image clean`), or set XDG_CACHE_HOME to a directory"
            remedy += " on another disk"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            remedy = "make it yours and writable, or set XDG_CACHE_HOME to a directory that is"
        else:
            remedy = "look at the disk, then try again"
        raise ImageError(f"the image store {place}: {error}; {remedy}") from error


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """An empty directory that becomes `final` when the block ends well, in place of what was
    there; otherwise it is removed. Raises ImageError where the disk is full or not writable."""
    with explained(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=final.parent))
        try:
            yield folder
            for path in folder.iterdir():
                if path.is_file():
                    settle(path)
            _sync_folder(folder)
            remove(final)
            folder.rename(final)
            _sync_folder(final.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """A path to write; what is there when the block ends well becomes `final`. See new_folder."""
    with explained(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=final.parent)
        os.close(handle)
        path = Path(name)
        try:
            yield path
            settle(path)
            path.replace(final)
            _sync_folder(final.parent)
        finally:
            path.unlink(missing_ok=True)


def settle(path: Path) -> None:
    """Brings a file to the disk and marks it as published."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    path.chmod(0o644)
    os.utime(path, (PUBLISHED, PUBLISHED))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Takes a file or directory away: its name at once, then what is in it."""
    with (
        tempfile.TemporaryDirectory(
            prefix=TEMPORARY, dir=path.parent, ignore_cleanup_errors=True
        ) as grave,
        contextlib.suppress(FileNotFoundError),
    ):
        path.rename(Path(grave) / path.name)


def damage(root: Path, record: StoredFile, *, thorough: bool = False) -> str | None:
    """What is wrong with a stored file, or None. Its content is read only where it may have been
    written to, or `thorough` asks for it."""
    path = root / record.path
    try:
        status = path.stat()
        if status.st_size != record.size:
            return f"{path} has {status.st_size} bytes instead of {record.size}"
        if not thorough and int(status.st_mtime) == PUBLISHED:
            return None
        if digest_of(path) != record.sha256:
            return f"{path} is not what was put there (its SHA-256 differs)"
        if int(status.st_mtime) != PUBLISHED:
            # A copy of a store has new times. Where it is not ours to mark, it is read each time.
            with contextlib.suppress(OSError):
                os.utime(path, (PUBLISHED, PUBLISHED))
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} can't be read: {error.strerror}"
    return None
