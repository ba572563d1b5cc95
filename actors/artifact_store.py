"""Files by their content: what runs leave behind is kept once, under its SHA-256.

A run process writes into the store before it tells anyone, so what the journal lists is there,
whoever dies afterwards. Nothing in it is ever changed; `remove` takes away what nobody lists.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

from voidbus.actors.disk_remedy import disk_remedy

_DIGEST = re.compile(r"[0-9a-f]{64}\Z")


class ArtifactStore:
    """A folder of blobs: `ab/cdef...`. Safe for many processes at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, content: bytes) -> str:
        """Keep `content`; its digest. Raises OSError, naming the store, with what to do."""
        digest = hashlib.sha256(content).hexdigest()
        path = self._path(digest)
        try:
            if path.exists():
                os.utime(path)  # it is wanted again: no sweep takes it for a leftover
                return digest
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            try:
                _write(fresh, content)
                fresh.replace(path)
            finally:
                fresh.unlink(missing_ok=True)
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot keep a file in {self._folder}: {error.strerror}; {disk_remedy(error)}",
            ) from error
        return digest

    def read(self, digest: str, offset: int, limit: int) -> bytes:
        """Part of a file. Raises FileNotFoundError for content that is not kept, or OSError."""
        with self._path(digest).open("rb") as file:
            file.seek(offset)
            return file.read(limit)

    def older_than(self, before: float) -> list[str]:
        """The digests of what was last put before `before` (seconds since the epoch). Also removes
        what a writer that was killed left half-written then."""
        found = []
        for path in self._files():
            with contextlib.suppress(OSError):
                if path.stat().st_mtime >= before:
                    continue
                if path.name.startswith("."):
                    path.unlink()
                else:
                    found.append(path.parent.name + path.name)
        return found

    def remove(self, digests: Iterable[str], before: float) -> int:
        """Remove files, unless they were put again since `before`; how many bytes that freed."""
        freed = 0
        for digest in digests:
            path = self._path(digest)
            with contextlib.suppress(OSError):
                found = path.stat()
                if found.st_mtime < before:
                    path.unlink()
                    freed += found.st_size
        return freed

    def _files(self) -> Iterator[Path]:
        with contextlib.suppress(OSError):
            for folder in self._folder.iterdir():
                yield from folder.iterdir()

    def _path(self, digest: str) -> Path:
        if _DIGEST.match(digest) is None:  # it becomes a path
            raise FileNotFoundError(f"{digest[:80]!r} is no digest of a kept file")
        return self._folder / digest[:2] / digest[2:]


def _write(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        pending = memoryview(content)
        while pending:
            pending = pending[os.write(fd, pending) :]
        os.fsync(fd)  # the journal is to list nothing that a power cut could empty
    finally:
        os.close(fd)


def unlisted_before(active_since: Iterable[str]) -> float:
    """Until when unlisted files may be removed (seconds since the epoch): a run that goes on may
    list what it has put since it started, and one that is ending what it put last. The times are
    RFC 3339."""
    started = (datetime.fromisoformat(text[:19] + "Z").timestamp() for text in active_since)
    return min([time.time() - 3600.0, *started])
