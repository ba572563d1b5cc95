"""Reading a tar archive nobody vouches for: forward only, bounded in what it makes us hold.

Python's tarfile reads extended headers whole, whatever length they claim. So it is given a stream
that refuses to hand out much at once, and to go back.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, cast

from voidbus.vm.image.fault import ImageError

MAX_READ_BYTES = 1 << 20
"""More than any extended header of a real file has (a path, a link, attributes)."""

_BLOCK = 1 << 18

# What tarfile and the decompressors raise over bytes that are not what they should be.
BAD_ARCHIVE = (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError)


class ForwardStream:
    """As much of a file as tarfile needs: `read`, `tell`, and `seek` that goes forward."""

    def __init__(self, source: BinaryIO, limit: int) -> None:
        self._source = source
        self._limit = limit
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        """The next bytes. Raises ValueError for more than MAX_READ_BYTES at once, and where the
        archive is longer than the limit."""
        if not 0 <= size <= MAX_READ_BYTES:
            raise ValueError(f"a header claims {size} bytes")
        parts = []
        while size > 0:
            part = self._source.read(size)
            if not part:
                break
            parts.append(part)
            size -= len(part)
            self._position += len(part)
            if self._position > self._limit:
                raise ValueError(f"it unpacks to more than {self._limit} bytes")
        return b"".join(parts)

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        """Skips to `position`. Raises ValueError for one that lies behind."""
        if position < self._position:
            raise ValueError("it points back into itself")
        while self._position < position:
            if not self.read(min(_BLOCK, position - self._position)):
                break
        return self._position

    def drain(self) -> None:
        """Reads what is left."""
        while self.read(_BLOCK):
            pass


@dataclass(frozen=True, slots=True)
class Member:
    """A member of an archive; `content` gives its bytes, and only while it is the current one."""

    info: tarfile.TarInfo
    content: BinaryIO | None


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns what bad archives raise into an ImageError about `what`."""
    try:
        yield
    except BAD_ARCHIVE as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ImageError(
            f"{what} is no sound archive: {reason}; make it again, or fetch it anew"
        ) from error


def members(source: BinaryIO, limit: int, what: str) -> Iterator[Member]:
    """The members of the archive in `source`, in order, which is read to its end. At most `limit`
    bytes are read. Raises ImageError where it is no sound archive, and OSError."""
    stream = ForwardStream(source, limit)
    with reading(what):
        with tarfile.open(
            fileobj=cast("BinaryIO", stream),
            mode="r:",
            encoding="utf-8",
            errors="surrogateescape",
        ) as archive:
            while (info := archive.next()) is not None:
                if info.size < 0:
                    raise ValueError("a member has a negative size")
                if info.sparse is not None:
                    raise ValueError(f"{info.name!r} is a sparse file, which is not supported")
                file = archive.extractfile(info) if info.isreg() else None
                yield Member(info, cast("BinaryIO | None", file))
                # tarfile remembers every member it has seen.
                archive.members.clear()  # type: ignore[attr-defined]
        stream.drain()
