"""The host's file requests, held inside the roots they are allowed in."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from .descent import descend, enter
from .file_messages import FileContent, FileStat, WriteFile
from .identity import Identity
from .outcome import Outcome
from .paths import names_of, reason
from .place import Place


class Files:
    """File requests of one machine. Nothing here raises on a bad path: answers say why."""

    def __init__(self, place: Place, identity: Identity | None) -> None:
        self._place = place
        self._identity = identity

    def write(self, request: WriteFile) -> Outcome:
        try:
            self._require_writable(request.path)
            with self._parent(request.path, create=request.create_parents) as (parent, name):
                flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                fd = os.open(name, flags, 0o644, dir_fd=parent)
                try:
                    _require_regular(fd)
                    os.ftruncate(fd, 0)
                    os.fchmod(fd, 0o644)
                    self._own(fd)
                    pending = memoryview(request.content)
                    while pending:
                        pending = pending[os.write(fd, pending) :]
                finally:
                    os.close(fd)
        except (OSError, ValueError) as error:
            return Outcome(False, reason(error, request.path))
        return Outcome(True)

    def mkdir(self, path: str) -> Outcome:
        try:
            self._require_writable(path)
            with self._parent(path, create=True, whole=True):
                return Outcome(True)
        except (OSError, ValueError) as error:
            return Outcome(False, reason(error, path))

    def read(self, path: str, limit: int) -> FileContent:
        """A file's content. ``limit`` is the most bytes an answer can carry."""
        try:
            with self._parent(path, create=False) as (parent, name):
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                fd = os.open(name, flags, dir_fd=parent)
                try:
                    _require_regular(fd)
                    content = _read_up_to(fd, limit)
                finally:
                    os.close(fd)
        except (OSError, ValueError) as error:
            return FileContent(False, b"", reason(error, path))
        if content is None:
            return FileContent(False, b"", f"{path}: larger than one answer can carry ({limit} B)")
        return FileContent(True, content)

    def stat(self, path: str) -> FileStat:
        """Any path, links followed (protocol, "File RPCs")."""
        try:
            found = os.stat(self._place.path(path))  # noqa: PTH116 - pathlib loads slowly
        except (FileNotFoundError, NotADirectoryError):
            return FileStat(False)
        except (OSError, ValueError) as error:
            return FileStat(False, None, reason(error, path))
        return FileStat(True, found.st_size)

    @contextlib.contextmanager
    def _parent(self, path: str, *, create: bool, whole: bool = False) -> Iterator[tuple[int, str]]:
        """The opened directory that holds ``path`` and the last name; with ``whole`` the
        directory ``path`` itself."""
        names = names_of(path)
        step = self._enter_or_make if create else enter
        start, way = self._place.start_of(names if whole else names[:-1])
        with descend(start, way, step) as parent:
            yield parent, names[-1]

    def _enter_or_make(self, parent: int, name: str) -> int:
        try:
            os.mkdir(name, 0o755, dir_fd=parent)
        except FileExistsError:
            return enter(parent, name)
        fd = enter(parent, name)
        try:
            self._own(fd)
        except OSError:
            os.close(fd)
            raise
        return fd

    def _require_writable(self, path: str) -> None:
        if self._place.read_only(names_of(path)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def _own(self, fd: int) -> None:
        if self._identity is not None:
            os.fchown(fd, self._identity.uid, self._identity.gid)


def _require_regular(fd: int) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise OSError(errno.EINVAL, "not a regular file")


def _read_up_to(fd: int, limit: int) -> bytes | None:
    if os.fstat(fd).st_size > limit:
        return None
    parts: list[bytes] = []
    left = limit + 1
    while left > 0 and (data := os.read(fd, min(left, 1 << 20))):
        parts.append(data)
        left -= len(data)
    return None if left <= 0 else b"".join(parts)
