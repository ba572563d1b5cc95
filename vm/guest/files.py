"""The host's file requests, held inside the roots they are allowed in.

Every directory on the way is opened by itself, relative to the one before and without
following links, so neither ``..`` nor a link, nor one put there meanwhile, leads out.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from .file_messages import FileContent, FileStat, WriteFile
from .identity import Identity
from .outcome import Outcome
from .place import Place

ROOTS = ("/workspace", "/home", "/etc/voidbox")
"""Where files may be read and written (protocol, "File RPCs")."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Files:
    """File requests of one machine. Nothing here raises on a bad path: answers say why."""

    def __init__(self, place: Place, identity: Identity | None) -> None:
        self._place = place
        self._identity = identity

    def write(self, request: WriteFile) -> Outcome:
        try:
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
            return Outcome(False, _reason(error, request.path))
        return Outcome(True)

    def mkdir(self, path: str) -> Outcome:
        try:
            with self._parent(path, create=True, whole=True):
                return Outcome(True)
        except (OSError, ValueError) as error:
            return Outcome(False, _reason(error, path))

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
            return FileContent(False, b"", _reason(error, path))
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
            return FileStat(False, None, _reason(error, path))
        return FileStat(True, found.st_size)

    @contextlib.contextmanager
    def _parent(self, path: str, *, create: bool, whole: bool = False) -> Iterator[tuple[int, str]]:
        """The opened directory that holds ``path`` and the last name; with ``whole`` the
        directory ``path`` itself."""
        names = _names(path)
        # The root "/" (or the scratch directory) is ours; from there on nothing is trusted.
        fd = os.open(self._place.root or "/", _DIRECTORY)
        try:
            for name in names if whole else names[:-1]:
                below = self._descend(fd, name, create=create)
                os.close(fd)
                fd = below
            yield fd, names[-1]
        finally:
            os.close(fd)

    def _descend(self, parent: int, name: str, *, create: bool) -> int:
        made = False
        if create:
            try:
                os.mkdir(name, 0o755, dir_fd=parent)
                made = True
            except FileExistsError:
                pass
        fd = os.open(name, _DIRECTORY, dir_fd=parent)
        if made:
            self._own(fd)
        return fd

    def _own(self, fd: int) -> None:
        if self._identity is not None:
            os.fchown(fd, self._identity.uid, self._identity.gid)


def _names(path: str) -> list[str]:
    names = [name for name in path.split("/") if name not in ("", ".")]
    inside = any(
        names[: len(root)] == root and len(names) >= len(root)
        for root in ([part for part in text.split("/") if part] for text in ROOTS)
    )
    if not path.startswith("/") or ".." in names or not inside:
        raise ValueError(f"{path!r} is outside {', '.join(ROOTS)}")
    return names


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


def _reason(error: Exception, path: str) -> str:
    if isinstance(error, OSError):
        if error.errno == errno.ELOOP:
            return f"{path}: links are not followed"
        return f"{path}: {error.strerror}"
    return str(error)
